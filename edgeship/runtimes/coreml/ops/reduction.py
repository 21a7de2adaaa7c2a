"""Reductions over axes: all axes where none are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs


def _product(x: Tensor, axes: list[int]) -> Tensor:
    """Along ``axes``, which become 1."""
    for axis in axes:
        x = torch.prod(x, dim=axis, keepdim=True)
    return x


def _mean(x: Tensor, axes: list[int]) -> Tensor:
    """Along ``axes``, which become 1; integers in float64."""
    return torch.mean(x if x.dtype.is_floating_point else x.double(), dim=axes, keepdim=True)


#: Each keeps the reduced axes, with size 1; a mean, norm or logarithm of integers is taken in floating point.
_REDUCTIONS: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "reduce_sum": lambda x, axes: torch.sum(x, dim=axes, keepdim=True),
    "reduce_mean": _mean,
    "reduce_max": lambda x, axes: torch.amax(x, dim=axes, keepdim=True),
    "reduce_min": lambda x, axes: torch.amin(x, dim=axes, keepdim=True),
    "reduce_prod": _product,
    "reduce_l1_norm": lambda x, axes: torch.sum(x.abs(), dim=axes, keepdim=True),
    "reduce_l2_norm": lambda x, axes: torch.sqrt(torch.sum(x * x, dim=axes, keepdim=True).float()),
    "reduce_log_sum": lambda x, axes: torch.log(torch.sum(x, dim=axes, keepdim=True).float()),
    "reduce_log_sum_exp": lambda x, axes: torch.logsumexp(x.float(), dim=axes, keepdim=True),
    "reduce_sum_square": lambda x, axes: torch.sum(x * x, dim=axes, keepdim=True),
}


def _reduction(name: str) -> None:
    function = _REDUCTIONS[name]

    @op(name)
    def apply(call: Call) -> Outputs:
        x = call.numbers("x")
        axes = call.axes(x.dim())
        reduced = function(x, axes) if axes else x
        return reduced if call.flag("keep_dims") else _drop(reduced, axes)


def _drop(x: Tensor, axes: list[int]) -> Tensor:
    """``x`` without ``axes``, whose sizes are 1."""
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in axes])


for _name in _REDUCTIONS:
    _reduction(_name)


def _extremum(name: str, function: Callable[..., Tensor]) -> None:
    """Register ``name``: an index or value along ``axis``."""

    @op(name)
    def apply(call: Call) -> Outputs:
        x = call.numbers("x")
        return function(x, dim=call.axis("axis", -1, x.dim()), keepdim=call.flag("keep_dims"))


_extremum("reduce_argmax", torch.argmax)
_extremum("reduce_argmin", torch.argmin)
