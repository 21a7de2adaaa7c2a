"""Operators that only move integers of an activation: they run on the float values behind, and the grid goes along."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnx import NodeProto

from edgeship.frontends.onnx.graph import normal_domain
from edgeship.frontends.onnx.values import Grid, Quantized, Value, is_constant

#: These compute nothing, so that the result is on the grid of what they are given, or says where a value stands.
_MOVING = frozenset({
    "ArgMax", "ArgMin", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool",
    "Pad", "Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip


def carried(node: NodeProto, inputs: Sequence[Value], opset: int) -> tuple[Grid, list[Value]] | None:
    """The grid of integers that an operator only moves, and its inputs in float.

    None where it computes, or joins integers of several grids.
    """
    if node.op_type not in _MOVING or normal_domain(node.domain) or not isinstance(inputs[0], Quantized):
        return None
    moved = inputs if node.op_type == "Concat" else inputs[:1]
    grids = {value.grid if isinstance(value, Quantized) else None for value in moved}
    if len(grids) != 1:
        return None
    grid = inputs[0].grid
    floats: list[Value] = [value.value if isinstance(value, Quantized) else value for value in inputs]
    if node.op_type == "Resize" and _text(node, "mode", "nearest") != "nearest":
        return None
    if node.op_type == "Pad" and _text(node, "mode", "constant") == "constant":
        filled = _filled(floats, grid)
        return None if filled is None or opset < 11 else (grid, filled)
    return grid, floats


def on_grid(value: Value, grid: Grid) -> Value:
    """A result that has moved, on its grid; places and shapes stay what they are."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return Quantized(value, grid)
    return value


def _filled(inputs: list[Value], grid: Grid) -> list[Value] | None:
    """Inputs of a Pad whose integer, 0 where none is given, is the number it stands for; None where it is not known."""
    given = inputs[2] if len(inputs) > 2 else None
    if given is not None and not (isinstance(given, torch.Tensor) and is_constant(given)):
        return None
    whole = 0 if given is None else int(given.reshape(-1)[0].item())
    value = torch.full((), grid.scale * (whole - grid.zero_point))
    return [*inputs[:2], value, *inputs[3:]]


def _text(node: NodeProto, name: str, default: str) -> str:
    found = next((item.s for item in node.attribute if item.name == name), default.encode())
    return str(found.decode("utf-8", "replace"))
