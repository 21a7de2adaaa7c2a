"""Pools."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.ops.windows import Windows, pads_list, windows
from edgeship.frontends.onnx.registry import Result, op

Tensor = torch.Tensor

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@op("MaxPool")
def max_pool(call: OpCall) -> Result:
    """Values, and where asked for their places in the flattened input."""
    x = call.x(0)
    place = _windows(call, x)
    padding = place.begins
    pooled = x if x.is_floating_point() else x.to(torch.float32)
    if not _native(place):
        pooled = F.pad(pooled, pads_list(place.begins, place.ends), "constant", float("-inf"))
        padding = (0,) * len(place.kernel)
    function = _MAX_POOL[x.dim() - 2]
    if not call.wants(1):
        return function(pooled, place.kernel, place.strides, padding, place.dilations).to(x.dtype)
    values, indices = function(
        pooled, place.kernel, place.strides, padding, place.dilations, False, return_indices=True
    )
    by_column = bool(call.attr_int("storage_order", 0))
    return values.to(x.dtype), _global_indices(indices, x, place, by_column=by_column)


def _native(place: Windows) -> bool:
    return place.symmetric and all(2 * pad <= size for pad, size in zip(place.begins, place.kernel, strict=True))


def _global_indices(indices: Tensor, x: Tensor, place: Windows, *, by_column: bool) -> Tensor:
    """Indices into the whole flattened input: ONNX counts through batch and channels as well."""
    spatial = tuple(x.shape[2:])
    padded = spatial
    if not _native(place):
        padded = tuple(a + n + b for a, n, b in zip(place.begins, spatial, place.ends, strict=True))
    coordinates = []
    for axis, size in enumerate(padded):
        coordinate = torch.remainder(torch.div(indices, math.prod(padded[axis + 1 :]), rounding_mode="floor"), size)
        coordinates.append(torch.sub(coordinate, place.begins[axis]) if padded != spatial else coordinate)
    order = range(len(spatial)) if by_column else reversed(range(len(spatial)))
    result, stride = torch.zeros((), dtype=torch.int64), 1
    for axis in order:
        result = torch.add(result, torch.mul(coordinates[axis], stride))
        stride *= spatial[axis]
    plane = torch.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *(1,) * len(spatial))
    return torch.add(result, plane * math.prod(spatial))


@op("AveragePool")
def average_pool(call: OpCall) -> Tensor:
    """One call where torch's way of counting the padding is the right one, else sums over counts.

    [N, C, ...] -> [N, C, ...windows].
    """
    x = call.x(0)
    place = _windows(call, x)
    rank = len(place.kernel)
    with_padding = bool(call.attr_int("count_include_pad", 0))
    plain = set(place.dilations) == {1}
    if plain and _native(place) and (with_padding or not any(place.begins)) and place.ends == place.declared_ends:
        return _AVG_POOL[rank](x, place.kernel, place.strides, place.begins, False, True)
    if plain and _native(place) and place.ends == place.declared_ends:
        return _AVG_POOL[rank](x, place.kernel, place.strides, place.begins, False, False)
    # How many numbers of the input each window holds: counted by pooling ones, [1, 1, ...windows].
    inside = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype)
    if with_padding:
        inside = F.pad(inside, pads_list(place.begins, place.declared_ends), "constant", 1.0)
        begins: tuple[int, ...] = (0,) * rank
        ends = tuple(a - b for a, b in zip(place.ends, place.declared_ends, strict=True))
        counts = _window_sum(inside, place, begins, ends)
    else:
        counts = _window_sum(inside, place, place.begins, place.ends)
    return torch.div(_window_sum(x, place, place.begins, place.ends), counts)


def _window_sum(x: Tensor, place: Windows, begins: tuple[int, ...], ends: tuple[int, ...]) -> Tensor:
    """Sum of each window; dilation, which no average pool has, needs a convolution with ones.

    [N, C, ...] -> [N, C, ...windows].
    """
    rank = len(place.kernel)
    padded = F.pad(x, pads_list(begins, ends)) if any(begins) or any(ends) else x
    if set(place.dilations) == {1}:
        mean = _AVG_POOL[rank](padded, place.kernel, place.strides, 0, False, True)
        return torch.mul(mean, math.prod(place.kernel))
    # [N, C, ...] -> [N * C, 1, ...], so that one kernel of ones serves every channel
    flat = torch.reshape(padded, (-1, 1, *padded.shape[2:]))
    ones = torch.ones((1, 1, *place.kernel), dtype=x.dtype)
    summed = _CONV[rank](flat, ones, None, place.strides, 0, place.dilations)
    return torch.reshape(summed, (*x.shape[:2], *summed.shape[2:]))


@op("LpPool")
def lp_pool(call: OpCall) -> Tensor:
    """P-th root of the sum of p-th powers. [N, C, ...] -> [N, C, ...windows]."""
    x, p = call.x(0), _norm(call)
    place = _windows(call, x)
    powered = torch.mul(x, x) if p == 2 else torch.pow(torch.abs(x), p)
    return _root(_window_sum(powered, place, place.begins, place.ends), p)


@op("GlobalLpPool")
def global_lp_pool(call: OpCall) -> Tensor:
    """Over all of each channel."""
    x, p = call.x(0), _norm(call)
    powered = torch.mul(x, x) if p == 2 else torch.pow(torch.abs(x), p)
    return _root(torch.sum(powered, list(range(2, x.dim())), keepdim=True), p)


def _norm(call: OpCall) -> float:
    """``p`` was a float at first."""
    return call.attr_float("p", 2.0) if call.opset < 2 else float(call.attr_int("p", 2))


def _root(x: Tensor, p: float) -> Tensor:
    """Any shape."""
    return torch.sqrt(x) if p == 2 else torch.pow(x, 1.0 / p)


@op("GlobalAveragePool")
def global_average_pool(call: OpCall) -> Tensor:
    """Over all of each channel."""
    x = call.x(0)
    return torch.mean(x, list(range(2, x.dim())), keepdim=True)


@op("GlobalMaxPool")
def global_max_pool(call: OpCall) -> Tensor:
    """Over all of each channel."""
    x = call.x(0)
    return torch.amax(x, list(range(2, x.dim())), keepdim=True)


@op("MaxUnpool")
def max_unpool(call: OpCall) -> Tensor:
    """Indices count through the whole (default-sized) output; a larger ``output_shape`` is zeros behind it."""
    x, indices = call.x(0), call.x(1)
    rank = x.dim() - 2
    kernel = call.attr_ints("kernel_shape")
    strides = call.attr_ints("strides", (1,) * rank)
    pads = call.attr_ints("pads", (0,) * (2 * rank))
    if not len(kernel) == len(strides) == rank or len(pads) != 2 * rank:
        raise call.broken("kernel_shape, strides or pads do not fit its input")
    spatial = [
        (x.shape[2 + axis] - 1) * strides[axis] + kernel[axis] - pads[axis] - pads[axis + rank] for axis in range(rank)
    ]
    inferred = [*x.shape[:2], *spatial]
    call.check_size(inferred)
    flat = torch.scatter(
        torch.zeros(math.prod(inferred), dtype=x.dtype),
        0,
        torch.reshape(indices, (indices.numel(),)),
        torch.reshape(x, (x.numel(),)),
    )
    result = torch.reshape(flat, tuple(inferred))
    if not call.given(2):
        return result
    wanted = call.const_ints(2, "output_shape")
    grown = [b - a for a, b in zip(inferred, wanted, strict=True)]
    return F.pad(result, [width for extra in reversed(grown) for width in (0, extra)])


def _windows(call: OpCall, x: Tensor) -> Windows:
    """The windows of a pool over ``x`` [N, C, ...]."""
    if x.dim() - 2 not in _MAX_POOL:
        raise call.refuse(f"{x.dim() - 2} spatial axes; 1, 2 and 3 are imported")
    kernel = tuple(call.attr_ints("kernel_shape"))
    return windows(call, tuple(x.shape[2:]), kernel, ceil=bool(call.attr_int("ceil_mode", 0)))
