"""Tensors from numbers: filled, counted, one-hot, banded, summed up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgeship.runtimes.coreml.ops.registry import Call, computable, op

if TYPE_CHECKING:
    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs


def _scalar(call: Call, name: str, default: float) -> Tensor:
    """An argument as a scalar."""
    return computable(call.tensor(name)).reshape(()) if call.has(name) else torch.tensor(default)


@op("fill")
def fill(call: Call) -> Outputs:
    """``value`` in the shape ``shape``."""
    return _scalar(call, "value", 0.0).expand(call.integers("shape")).clone()


@op("fill_like")
def fill_like(call: Call) -> Outputs:
    """``value`` in the shape of another tensor."""
    return _scalar(call, "value", 0.0).expand(call.tensor("ref_tensor").shape).clone()


@op("range_1d")
def range_1d(call: Call) -> Outputs:
    """From ``start`` in steps of ``step`` to below ``end``."""
    start, end, step = (call.numbers(name).reshape(()).item() for name in ("start", "end", "step"))
    return torch.arange(start, end, step)


@op("one_hot")
def one_hot(call: Call) -> Outputs:
    """``on_value`` at the index along a new axis, ``off_value`` elsewhere (and for indices outside)."""
    index = call.tensor("indices").to(torch.int64)
    axis = call.axis("axis", -1, index.dim() + 1)
    size = call.integer("one_hot_vector_size")
    places = torch.arange(size).reshape([size if i == axis else 1 for i in range(index.dim() + 1)])
    return torch.where(index.unsqueeze(axis) == places, _scalar(call, "on_value", 1), _scalar(call, "off_value", 0))


@op("band_part")
def band_part(call: Call) -> Outputs:
    """Each matrix with everything outside a band around the diagonal set to 0; a negative width is no limit."""
    x = call.data("x")
    below = torch.arange(x.shape[-2]).unsqueeze(1) - torch.arange(x.shape[-1])
    lower, upper = call.integer("lower", -1), call.integer("upper", -1)
    keep = torch.ones_like(below, dtype=torch.bool)
    if lower >= 0:
        keep &= below <= lower
    if upper >= 0:
        keep &= -below <= upper
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype))


@op("cumsum")
def cumsum(call: Call) -> Outputs:
    """Running sums along ``axis``, from the end if reversed, without the element itself if exclusive."""
    x = call.numbers("x")
    axis = call.axis("axis", 0, x.dim())
    if call.flag("reverse"):
        x = torch.flip(x, [axis])
    total = torch.cumsum(x, dim=axis)
    if call.flag("exclusive"):
        total = total - x
    return torch.flip(total, [axis]) if call.flag("reverse") else total


@op("non_zero")
def non_zero(call: Call) -> Outputs:
    """The index of each element that is not 0, a row each."""
    return torch.nonzero(call.numbers("x"))
