"""Short names for what the converter named after call stacks: in a small model they take a fifth of the file."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

# The converter joins the classes and modules that an operator came from, over and over where it merged several.
_MARKS = (b"/", b";")


def shorten_names(model: schema.ModelT, kept: Collection[str]) -> None:
    """Number the tensors whose names are call stacks: ``t17``.

    Args:
        kept: names that something looks for: weights, inputs and outputs.
    """
    wanted = {name.encode() for name in kept}
    for graph in model.subgraphs:
        for entry in {*graph.inputs, *graph.outputs}:
            wanted.add(bytes(graph.tensors[entry].name or b""))
        for number, tensor in enumerate(graph.tensors):
            name = bytes(tensor.name or b"")
            if name not in wanted and any(mark in name for mark in _MARKS):
                tensor.name = b"t%d" % number
