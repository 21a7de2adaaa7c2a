"""The mathematics of compression: torch only, no files, one algorithm a file, the paper named."""
