"""Where in the user's model an operator of the graph comes from, for messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.fx import Node


def where(node: Node) -> str:
    """The module path of a node, ``encoder.layers.3``, or else its name in the graph and its first weight."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        inner = str(path).removeprefix("L['self'].").removeprefix("model.")
        if inner and inner not in ("model", "L['self']"):
            return inner
    for argument in node.all_input_nodes:
        if argument.op in ("placeholder", "get_attr") and str(argument.target).startswith(("p_", "b_")):
            return f"node {node.name}, which reads {argument.name[2:]}"
    return f"node {node.name}"
