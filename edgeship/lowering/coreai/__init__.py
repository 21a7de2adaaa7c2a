"""Torch programs to Core AI: the graph is lowered with hollow weights, and each weight is put in as it was decided."""
