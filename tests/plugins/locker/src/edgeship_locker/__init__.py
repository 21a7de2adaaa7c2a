"""A device for edgeship in a package of its own: a folder that stands for a phone."""
