"""Reductions along axes, cumulative sums, and what ranks values."""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.ops.elementwise import widened
from edgeship.frontends.onnx.registry import Result, op
from edgeship.frontends.onnx.values import is_constant

Tensor = torch.Tensor
Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _reduction(name: str, function: Reduction, elementwise: Callable[[Tensor], Tensor] | None = None) -> None:
    """Register a reduction; ``elementwise`` is what is left of it over no axes at all."""

    @op(name)
    def run(call: OpCall) -> Tensor:
        x = call.x(0)
        axes = call.ints_from("axes", 1)
        if not axes and call.attr_int("noop_with_empty_axes", 0):
            return x if elementwise is None else widened(elementwise, x)
        # Before opset 13 an empty list meant all axes as well.
        chosen = [call.axis(axis, x.dim()) for axis in axes] if axes else list(range(x.dim()))
        if len(set(chosen)) != len(chosen):
            raise call.broken(f"axes {axes} name one axis twice")
        if not chosen:
            return x if elementwise is None else elementwise(x)
        keep = bool(call.attr_int("keepdims", 1))
        return widened(lambda t: function(t, sorted(chosen), keep), x)


def _square_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Along ``axes``."""
    return torch.sum(torch.mul(x, x), axes, keepdim=keep, dtype=x.dtype)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Along ``axes``."""
    for axis in reversed(axes):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def _far_end(dtype: torch.dtype, *, low: bool) -> float | bool:
    """The lowest or highest number of a type: the largest, or smallest, of no numbers at all."""
    if dtype == torch.bool:
        return not low
    if dtype.is_floating_point:
        return float("-inf") if low else float("inf")
    info = torch.iinfo(dtype)
    return info.min if low else info.max


def _extreme(x: Tensor, axes: list[int], keep: bool, *, largest: bool) -> Tensor:
    """The largest or smallest along ``axes``, which become 1 or, without ``keep``, go."""
    if x.numel() == 0:
        shape: list[int] = []
        for axis, size in enumerate(x.shape):
            if axis not in axes:
                shape.append(size)
            elif keep:
                shape.append(1)
        return torch.full(shape, _far_end(x.dtype, low=largest), dtype=x.dtype)
    if x.dtype == torch.bool:
        for axis in reversed(axes):
            x = torch.any(x, axis, keepdim=keep) if largest else torch.all(x, axis, keepdim=keep)
        return x
    return torch.amax(x, axes, keepdim=keep) if largest else torch.amin(x, axes, keepdim=keep)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Along ``axes``; integers are summed in float64."""
    if x.is_floating_point():
        return torch.mean(x, axes, keepdim=keep)
    return torch.mean(x, axes, keepdim=keep, dtype=torch.float64).to(x.dtype)


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Along ``axes``; integers in float64."""
    return torch.logsumexp(x if x.is_floating_point() else x.to(torch.float64), axes, keepdim=keep).to(x.dtype)


_reduction("ReduceSum", lambda x, axes, keep: torch.sum(x, axes, keepdim=keep, dtype=x.dtype))
_reduction("ReduceMean", _mean)
_reduction("ReduceProd", _product)
_reduction("ReduceMax", lambda x, axes, keep: _extreme(x, axes, keep, largest=True))
_reduction("ReduceMin", lambda x, axes, keep: _extreme(x, axes, keep, largest=False))
_reduction("ReduceL1", lambda x, axes, keep: torch.sum(torch.abs(x), axes, keepdim=keep, dtype=x.dtype), torch.abs)
_reduction(
    "ReduceL2",
    lambda x, axes, keep: _norm(x, axes, keep).to(x.dtype),
    torch.abs,
)
_reduction("ReduceSumSquare", _square_sum, lambda x: torch.mul(x, x))
_reduction(
    "ReduceLogSum",
    lambda x, axes, keep: torch.log(torch.sum(x, axes, keepdim=keep, dtype=x.dtype)).to(x.dtype),
    lambda x: torch.log(x).to(x.dtype),
)
_reduction("ReduceLogSumExp", _log_sum_exp)


@op("ArgMax", "ArgMin")
def argmax(call: OpCall) -> Tensor:
    """Of equal values the first, or with `select_last_index` the last. Indices along ``axis``."""
    x = call.x(0)
    axis = call.axis(call.attr_int("axis", 0), x.dim())
    keep = bool(call.attr_int("keepdims", 1))
    function = torch.argmax if call.node.op_type == "ArgMax" else torch.argmin
    if not call.attr_int("select_last_index", 0):
        return function(x, axis, keepdim=keep)
    return torch.sub(x.shape[axis] - 1, function(torch.flip(x, [axis]), axis, keepdim=keep))


@op("CumSum", "CumProd")
def cumulative(call: OpCall) -> Tensor:
    """Running sum or product, from either end, with or without the element itself."""
    x = call.x(0)
    axis = call.axis(call.const_int(1, "axis"), x.dim())
    reverse, exclusive = call.attr_int("reverse", 0), call.attr_int("exclusive", 0)
    function, neutral = (torch.cumsum, 0) if call.node.op_type == "CumSum" else (torch.cumprod, 1)
    if reverse:
        x = torch.flip(x, [axis])
    result = function(x, axis, dtype=x.dtype)
    if exclusive and x.shape[axis]:
        first = torch.full([1 if i == axis else size for i, size in enumerate(x.shape)], neutral, dtype=x.dtype)
        result = torch.cat([first, torch.narrow(result, axis, 0, x.shape[axis] - 1)], axis)
    return torch.flip(result, [axis]) if reverse else result


@op("TopK")
def top_k_attribute(call: OpCall) -> Result:
    """Before opset 10 `k` is an attribute."""
    return _top_k(call, call.attr_int("k"))


@op("TopK", since=10)
def top_k(call: OpCall) -> Result:
    """`k` largest or smallest, sorted."""
    return _top_k(call, call.const_int(1, "K"))


def _top_k(call: OpCall, k: int) -> Result:
    """Of equal values the one with the lower index comes first, which only a stable sort promises."""
    x = call.x(0)
    axis = call.axis(call.attr_int("axis", -1), x.dim())
    largest = bool(call.attr_int("largest", 1))
    if not 0 <= k <= x.shape[axis]:
        raise call.broken(f"k is {k}, the axis has {x.shape[axis]} elements")
    if not is_constant(x) and x.is_floating_point() and x.dtype.itemsize > 1:
        # Ties between floats are rare, and every converter knows topk where few know a stable sort.
        values, indices = torch.topk(x, k, axis, largest, True)
        return values, indices
    wide = x.to(torch.int64) if x.dtype in (torch.uint16, torch.uint32, torch.uint64) else x
    values, indices = torch.sort(wide, stable=True, dim=axis, descending=largest)
    return torch.narrow(values, axis, 0, k).to(x.dtype), torch.narrow(indices, axis, 0, k)


def _norm(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """The root of the sum of squares; of graph values in units of the largest, so that no square leaves float16.

    Along ``axes``.
    """
    if is_constant(x) or not x.is_floating_point() or not x.numel():
        return torch.sqrt(_square_sum(x, axes, keep))
    largest = torch.amax(torch.abs(x), axes, keepdim=True)
    unit = torch.where(torch.gt(largest, 0.0), largest, 1.0)
    root = torch.sqrt(_square_sum(torch.div(x, unit), axes, True))
    length = torch.mul(root, unit)
    return length if keep else torch.reshape(length, tuple(n for i, n in enumerate(x.shape) if i not in axes))
