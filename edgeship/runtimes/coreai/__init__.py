"""Core AI assets: running them, and reading the weights that they store."""
