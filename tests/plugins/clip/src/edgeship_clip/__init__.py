"""A pass for edgeship in a package of its own."""
