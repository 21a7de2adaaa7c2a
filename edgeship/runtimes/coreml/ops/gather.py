"""Reading by index: TensorFlow's gather and gather_nd, NumPy's take_along_axis."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs


@op("gather")
def gather(call: Call) -> Outputs:
    """Slices of ``x`` along ``axis``; the first ``batch_dims`` axes of ``x`` and ``indices`` go together."""
    x = call.data("x")
    axis = call.axis("axis", 0, x.dim())
    batch = call.integer("batch_dims", 0)
    index = call.index("indices", x.shape[axis])
    if not batch:
        return _take(x, index, axis)
    rows, picks = x.flatten(0, batch - 1), index.flatten(0, batch - 1)
    taken = torch.stack([_take(row, pick, axis - batch) for row, pick in zip(rows, picks, strict=True)])
    return taken.reshape(*x.shape[:batch], *taken.shape[1:])


def _take(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """[..., n, ...] -> [..., *index, ...] along ``axis``."""
    taken = torch.index_select(x, axis, index.reshape(-1))
    return taken.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


@op("gather_along_axis")
def gather_along_axis(call: Call) -> Outputs:
    """Single elements along ``axis``; the result has the shape of ``indices``."""
    x = call.data("x")
    axis = call.axis("axis", 0, x.dim())
    return torch.gather(x, axis, call.index("indices", x.shape[axis]))


@op("gather_nd")
def gather_nd(call: Call) -> Outputs:
    """Slices of ``x`` at the places that the last axis of ``indices`` spells out."""
    x = call.data("x")
    batch = call.integer("batch_dims", 0)
    index = call.tensor("indices").to(torch.int64)
    if not batch:
        return _take_nd(call, x, index)
    rows, picks = x.flatten(0, batch - 1), index.flatten(0, batch - 1)
    taken = torch.stack([_take_nd(call, row, pick) for row, pick in zip(rows, picks, strict=True)])
    return taken.reshape(*x.shape[:batch], *taken.shape[1:])


def _take_nd(call: Call, x: Tensor, index: Tensor) -> Tensor:
    """``index`` [..., depth]: each last row picks from the first ``depth`` axes of ``x``."""
    depth = index.shape[-1]
    rows = torch.index_select(
        x.reshape(math.prod(x.shape[:depth]), math.prod(x.shape[depth:])), 0, flat_places(call, x, index).reshape(-1)
    )
    return rows.reshape([*index.shape[:-1], *x.shape[depth:]])


def flat_places(call: Call, x: Tensor, index: Tensor) -> Tensor:
    """The places spelled out in the last axis of ``index``, as positions in the flattened leading axes of ``x``."""
    places = torch.zeros(index.shape[:-1], dtype=torch.int64)
    for axis in range(index.shape[-1]):
        places = places * x.shape[axis] + call.checked(index[..., axis], x.shape[axis])
    return places
