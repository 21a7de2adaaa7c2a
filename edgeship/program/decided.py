"""Which operators of a program decide which boxes stay, and have to be computed in float32 to decide as torch does.

A suppression (`edgeship.program.suppression`) compares scores and shares of boxes: in float16 two scores of 0.9004 and
0.9006 are equal, and a corner at 511.6 is at 511.5. What such a decision is made of, back to the layers with weights,
and what is chosen by it, up to the next of them, is computed in float32; those layers are not. Nor has any of it an
integer grid: of 256 steps, places among a thousand boxes are wrong places, and most scores are ties.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.fx import Graph, Node

# Operators whose result is their first input, seen otherwise.
_SEEN = ("slice", "narrow", "view", "reshape", "unsqueeze", "squeeze", "expand", "_unsafe_view", "select", "clone",
    "pad", "constant_pad_nd", "getitem", "split", "split_with_sizes")  # fmt: skip
_PRODUCTS = ("matmul", "mm", "bmm")
_LAYERS = (
    "linear", "conv", "convolution", "addmm", "embedding", "layer_norm", "native_layer_norm", "batch_norm",
    "group_norm", "rms_norm", "scaled_dot_product_attention", "lstm", "gru",
)  # fmt: skip


def deciding_nodes(graph: Graph) -> set[Node]:
    """Every node with floats that a suppression is made of, or that is chosen by one."""
    rounds = [node for node in graph.nodes if _is_round(node)]
    if not rounds:
        return set()
    made_of = _reached(rounds, lambda node: node.all_input_nodes)
    chosen = _reached(rounds, lambda node: node.users)
    # What is chosen from counts as much as what chooses.
    whole = _reached([*made_of, *chosen], lambda node: node.all_input_nodes)
    return {node for node in whole if _has_floats(node)}


def _is_round(node: Node) -> bool:
    """Whether a node is one step of a suppression: what is left of the rows when the rivals of those kept are taken
    away, a product with zeros and ones that a comparison made."""
    if _name(node) != "sub":
        return False
    product = _origin(node.args[1])
    if _name(product) not in _PRODUCTS:
        return False
    rivals = _origin(product.args[1])  # type: ignore[attr-defined]
    given = rivals.args[0] if _name(rivals) in ("_to_copy", "to") else None  # type: ignore[attr-defined]
    return _dtype(given) == "torch.bool"


def _origin(node: object) -> object:
    while _name(node) in _SEEN:
        node = node.args[0]  # type: ignore[attr-defined]
    return node


def _reached(starts: Iterable[Node], following: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """``starts`` and what follows from them, up to layers with weights, inputs and outputs."""
    found: set[Node] = set()
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node in found or node.op != "call_function" or is_layer(node):
            continue
        found.add(node)
        waiting += following(node)
    return found


def is_layer(node: Node) -> bool:
    """Whether a node is an operator that has weights, or is computed in float16 as one that has."""
    return _name(node).rstrip("123d").rstrip("_") in _LAYERS or _name(node) in _LAYERS


def _has_floats(node: Node) -> bool:
    return any(_dtype(item).startswith("torch.float") for item in (node, *node.all_input_nodes))


def _dtype(node: object) -> str:
    value = getattr(node, "meta", {}).get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return str(getattr(value, "dtype", ""))


def _name(node: object) -> str:
    """The operator's name without its overload."""
    target = getattr(node, "target", "")
    return str(getattr(target, "__name__", target)).split(".")[0]
