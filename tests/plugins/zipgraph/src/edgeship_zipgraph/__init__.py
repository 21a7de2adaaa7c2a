"""A runtime for edgeship in a package of its own: a torch graph in a zip file, run by torch."""
