"""Slices: reading one, and writing one into a copy. Begin, end and stride mean what they mean in NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from edgeship.runtimes.coreml.ops.registry import Outputs


def _slices(call: Call, rank: int) -> tuple[slice | int, ...]:
    """One index or slice for each axis."""
    begin, end = call.integers("begin"), call.integers("end")
    stride = call.optional_integers("stride") or [1] * rank
    no_begin, no_end = _mask(call, "begin_mask", rank), _mask(call, "end_mask", rank)
    single = _mask(call, "squeeze_mask", rank)
    slices: list[slice | int] = []
    for axis in range(rank):
        first = None if no_begin[axis] else begin[axis]
        last = None if no_end[axis] else end[axis]
        slices.append(first or 0 if single[axis] else slice(first, last, stride[axis]))
    return tuple(slices)


def _mask(call: Call, name: str, rank: int) -> list[bool]:
    if not call.has(name):
        return [False] * rank
    return [bool(i) for i in call.integers(name)]


@op("slice_by_index")
def slice_by_index(call: Call) -> Outputs:
    """``x[begin:end:stride]`` by axis; masked ends are open, and squeezed axes are indexed."""
    x = call.tensor("x").numpy()
    # A negative stride gives a view that torch cannot hold.
    return torch.from_numpy(np.array(x[_slices(call, x.ndim)]))


@op("slice_update")
def slice_update(call: Call) -> Outputs:
    """A copy of ``x`` in which that slice is ``update``."""
    x = call.tensor("x").numpy().copy()
    x[_slices(call, x.ndim)] = call.tensor("update").numpy()
    return torch.from_numpy(x)


@op("slice_by_size")
def slice_by_size(call: Call) -> Outputs:
    """``size`` elements from ``begin`` by axis; -1 is the rest."""
    x = call.tensor("x").numpy()
    window = []
    for begin, size, length in zip(call.integers("begin"), call.integers("size"), x.shape, strict=True):
        begin = begin + length if begin < 0 else begin
        window.append(slice(begin, length if size == -1 else begin + size))
    return torch.from_numpy(x[tuple(window)])


@op("crop")
def crop(call: Call) -> Outputs:
    """Without so many rows at the top and bottom, and columns at the left and right."""
    x = call.data("x")
    (top, bottom), (left, right) = call.integers("crop_height"), call.integers("crop_width")
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]
