"""Torch programs to Core ML: rewrites of the graph, conversion, exact storage, and a package with stable bytes."""
