"""Writing by index into a copy, replacing or combining with what is there.

Where two updates meet at one place, ``update`` keeps one of them (undefined), the other modes combine both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from edgeship.errors import UnsupportedOpError
from edgeship.runtimes.coreml.ops.gather import flat_places
from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs


def _combine(call: Call, rows: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """``rows`` (R, n) with ``updates`` (M, n) at the rows ``index`` (M)."""
    mode = call.text("mode", "add")
    rows, updates = rows.clone(), updates.to(rows.dtype)
    if mode == "update":
        rows[index] = updates
        return rows
    if mode in ("add", "sub"):
        return rows.index_add_(0, index, updates, alpha=1 if mode == "add" else -1)
    if mode in ("mul", "max", "min"):
        return rows.index_reduce_(0, index, updates, {"mul": "prod", "max": "amax", "min": "amin"}[mode])
    if mode == "div":
        divisor = torch.ones_like(rows).index_reduce_(0, index, updates, "prod")
        whole = not rows.dtype.is_floating_point
        return torch.div(rows, divisor, rounding_mode="trunc") if whole else rows / divisor
    raise UnsupportedOpError(f"{call.operation.label}: mode {mode}", fix="known: update add sub mul div max min")


@op("scatter")
def scatter(call: Call) -> Outputs:
    """Whole slices along ``axis`` at the places of a vector."""
    data = call.numbers("data")
    axis = call.axis("axis", 0, data.dim())
    rows, updates = data.movedim(axis, 0), call.numbers("updates").movedim(axis, 0)
    index = call.index("indices", data.shape[axis]).reshape(-1)
    result = _combine(call, rows.flatten(1) if data.dim() > 1 else rows, index, updates.reshape(len(index), -1)
                      if data.dim() > 1 else updates.reshape(-1))  # fmt: skip
    return result.reshape(rows.shape).movedim(0, axis)


@op("scatter_along_axis")
def scatter_along_axis(call: Call) -> Outputs:
    """Single elements along ``axis``; ``indices`` and ``updates`` have one shape."""
    data = call.numbers("data")
    axis = call.axis("axis", 0, data.dim())
    index = call.index("indices", data.shape[axis])
    grids = torch.meshgrid(*[torch.arange(size) for size in index.shape], indexing="ij")
    places = torch.zeros(index.shape, dtype=torch.int64)
    for i in range(data.dim()):
        places = places * data.shape[i] + (index if i == axis else grids[i])
    updates = call.numbers("updates").expand(index.shape)
    return _combine(call, data.reshape(-1), places.reshape(-1), updates.reshape(-1)).reshape(data.shape)


@op("scatter_nd")
def scatter_nd(call: Call) -> Outputs:
    """Slices at the places that the last axis of ``indices`` spells out."""
    data = call.numbers("data")
    index = call.tensor("indices").to(torch.int64)
    depth = index.shape[-1]
    places = flat_places(call, data, index).reshape(-1)
    rows = data.reshape(math.prod(data.shape[:depth]), -1)
    updates = call.numbers("updates").reshape(len(places), -1)
    return _combine(call, rows, places, updates).reshape(data.shape)
