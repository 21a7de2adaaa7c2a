"""Where in the user's model an operator of the graph comes from, for messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.fx import Graph, Node


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


def keep_places(before: Graph, after: Graph, prefix: str = "") -> None:
    """Carry module paths over another export, so that an error can say where an operator is in the model.

    Operators of one name stay in order; where their number changed, nothing is said rather than something wrong.
    """

    def by_name(graph: Graph) -> dict[str, list[Node]]:
        found: dict[str, list[Node]] = {}
        for node in graph.nodes:
            if node.op == "call_function":
                found.setdefault(
                    str(node.target).split(".")[-2 if "." in str(node.target) else 0].strip("_"), []
                ).append(node)
        return found

    old = by_name(before)
    for name, nodes in by_name(after).items():
        if len(old.get(name, ())) != len(nodes):
            continue
        for node, origin in zip(nodes, old[name], strict=True):
            stack = origin.meta.get("nn_module_stack") or {}
            kept = {key: (path.removeprefix(prefix).strip("."), kind) for key, (path, kind) in stack.items()}
            if kept:
                node.meta["nn_module_stack"] = kept
