"""One file, one pass. Read the folders in this order: load, compress, lower, check, ship."""
