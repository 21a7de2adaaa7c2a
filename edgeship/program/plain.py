"""Spell arithmetic with constants as every converter reads it: numbers second, and no bounds that bound nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgeship.program.folding import fetch

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


def numbers_second(module: GraphModule) -> None:
    """``2 * x`` becomes ``x * 2``, and ``2 - x`` the operator for it: converters take the first argument's dtype."""
    import torch

    aten = torch.ops.aten
    swapped = {
        aten.mul.Tensor: aten.mul.Tensor,
        aten.add.Tensor: aten.add.Tensor,
        aten.sub.Tensor: aten.rsub.Scalar,
    }
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target not in swapped or len(node.args) != 2 or node.kwargs:
            continue
        number, tensor = node.args
        if isinstance(number, (int, float)) and not isinstance(tensor, (int, float)):
            node.target, node.args = swapped[node.target], (tensor, number)


def drop_idle_bounds(module: GraphModule) -> None:
    """Remove bounds at infinity: half-precision and integer engines cannot hold the constant, and it does nothing.

    The NaN of a value passes through a bound as it does without one.
    """
    import torch

    aten = torch.ops.aten
    clamps = (aten.clamp.default, aten.hardtanh.default, aten.clamp_min.default, aten.clamp_max.default)
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in (aten.maximum.default, aten.minimum.default):
            idle = -math.inf if node.target == aten.maximum.default else math.inf
            for other, value in (node.args, node.args[::-1]):
                if _is_all(module, value, idle) and other.meta["val"].shape == node.meta["val"].shape:
                    node.replace_all_uses_with(other)
                    break
        elif node.target in clamps:
            low, high = _bounds(node)
            if low in (None, -math.inf) and high in (None, math.inf):
                node.replace_all_uses_with(node.args[0])
            elif low == -math.inf or high == math.inf:
                node.target = aten.clamp.default
                node.args = (node.args[0], None if low == -math.inf else low, None if high == math.inf else high)
                node.kwargs = {}
    module.graph.eliminate_dead_code()


def _bounds(node: Node) -> tuple[Any, Any]:
    """Lower and upper bound of a clamp; numbers, nodes, or None."""
    import torch

    aten = torch.ops.aten
    given = [*node.args[1:], None, None]
    if node.target == aten.clamp_min.default:
        return node.kwargs.get("min", given[0]), None
    if node.target == aten.clamp_max.default:
        return None, node.kwargs.get("max", given[0])
    names = ("min_val", "max_val") if node.target == aten.hardtanh.default else ("min", "max")
    defaults = (-1.0, 1.0) if node.target == aten.hardtanh.default else (None, None)
    low, high = (
        node.kwargs.get(name, default if value is None else value)
        for name, value, default in zip(names, given, defaults, strict=False)
    )
    return low, high


def _is_all(module: GraphModule, node: Any, wanted: float) -> bool:
    """Whether a node is a constant of one value throughout."""
    import torch

    if getattr(node, "op", "") != "get_attr":
        return False
    value = fetch(module, str(node.target))
    floating = isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 0
    return floating and bool((value == wanted).all())
