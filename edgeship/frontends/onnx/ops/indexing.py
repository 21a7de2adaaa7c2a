"""Gather, scatter, and what else picks elements by index."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.dtypes import TORCH_DTYPE
from edgeship.frontends.onnx.registry import Result, op
from edgeship.frontends.onnx.values import Picked, is_constant

Tensor = torch.Tensor

_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def wrapped(call: OpCall, indices: Tensor, size: int) -> Tensor:
    """Indices counted from the front: ONNX allows negative ones, torch's gathers do not. Any shape."""
    indices = indices.to(torch.int64)
    if is_constant(indices):
        if indices.numel() and not -size <= int(indices.min()) <= int(indices.max()) < size:
            raise call.broken(f"an index is outside of {size} elements")
        return torch.where(indices < 0, indices + size, indices) if bool((indices < 0).any()) else indices
    return torch.where(indices < 0, torch.add(indices, size), indices)


def select(x: Tensor, axis: int, indices: Tensor) -> Tensor:
    """``index_select``, or a slice where the indices are known and follow one another.

    [..., n, ...] -> [..., indices, ...] along ``axis``.
    """
    if is_constant(indices) and not is_constant(x) and indices.numel():
        first, count = int(indices[0]), indices.numel()
        if torch.equal(indices, torch.arange(first, first + count)):
            return x if count == x.shape[axis] else torch.narrow(x, axis, first, count)
    return torch.index_select(x, axis, indices)


@op("Gather")
def gather(call: OpCall) -> Tensor:
    """Rows of a constant matrix by data-dependent indices are an embedding, whose indices are never negative."""
    x, indices = call.x(0), call.x(1)
    axis = call.axis(call.attr_int("axis", 0), x.dim())
    if is_constant(x) and not is_constant(indices) and x.dim() == 2 and axis == 0 and x.is_floating_point():
        return F.embedding(indices.to(torch.int64), call.weight(0))
    given = indices
    indices = wrapped(call, indices, x.shape[axis])
    if is_constant(indices) and indices.dim() == 0:
        return torch.select(x, axis, int(indices))
    if indices.dim() == 1 and x.dtype.itemsize > 1:
        return select(x, axis, indices)
    picked = select(x, axis, torch.reshape(indices, (indices.numel(),)))
    rows = torch.reshape(picked, (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))
    if is_constant(x) and not is_constant(rows) and x.dim() == 2 and axis == 0 and x.dtype.itemsize == 1:
        # Where a scale follows, `dequantize_linear` makes an embedding of them.
        call.dynamic[rows] = Picked(x, given)
    return rows


@op("GatherElements")
def gather_elements(call: OpCall) -> Tensor:
    """One index for each element of the result."""
    x = call.x(0)
    axis = call.axis(call.attr_int("axis", 0), x.dim())
    return torch.gather(x, axis, wrapped(call, call.x(1), x.shape[axis]))


@op("GatherND")
def gather_nd(call: OpCall) -> Tensor:
    """Index tuples in the last axis, looked up in the flattened tensor."""
    x, indices = call.x(0), call.x(1)
    batch = call.attr_int("batch_dims", 0)
    depth = indices.shape[-1]
    if tuple(x.shape[:batch]) != tuple(indices.shape[:batch]) or batch + depth > x.dim():
        raise call.broken(f"indices of shape {list(indices.shape)} into {list(x.shape)}")
    rows = math.prod(x.shape[:batch])
    inner = tuple(x.shape[batch + depth :])
    flat_index = flat_indices(call, indices, x.shape[batch : batch + depth])
    per_row = math.prod(x.shape[batch : batch + depth])
    flat_index = torch.reshape(flat_index, (rows, -1)) if flat_index.numel() else flat_index.reshape(rows, 0)
    if batch:
        flat_index = torch.add(flat_index, torch.arange(rows).reshape(rows, 1) * per_row)
    flat = torch.reshape(x, (rows * per_row, *inner))
    picked = select(flat, 0, torch.reshape(flat_index, (flat_index.numel(),)))
    return torch.reshape(picked, (*indices.shape[:-1], *inner))


def flat_indices(call: OpCall, indices: Tensor, shape: torch.Size) -> Tensor:
    """Index tuples in the last axis as indices into the flattened ``shape``."""
    result = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for place, size in enumerate(shape):
        part = wrapped(call, torch.select(indices, -1, place), size)
        stride = math.prod(shape[place + 1 :])
        part = part if stride == 1 else torch.mul(part, stride)
        result = part if place == 0 else torch.add(result, part)
    return result


@op("ScatterElements", "Scatter")
def scatter_elements(call: OpCall) -> Tensor:
    """One index for each update. ``indices`` and ``updates`` have one shape, the result that of ``x``."""
    x, updates = call.x(0), call.x(2)
    axis = call.axis(call.attr_int("axis", 0), x.dim())
    indices = wrapped(call, call.x(1), x.shape[axis])
    reduction = call.attr_text("reduction", "none")
    if reduction == "none":
        return torch.scatter(x, axis, indices, updates)
    return torch.scatter_reduce(x, axis, indices, updates, _REDUCE[reduction], include_self=True)


@op("ScatterND")
def scatter_nd(call: OpCall) -> Tensor:
    """Index tuples in the last axis, written into the flattened tensor."""
    x, indices, updates = call.x(0), call.x(1), call.x(2)
    depth = indices.shape[-1]
    if depth > x.dim():
        raise call.broken(f"indices of shape {list(indices.shape)} into {list(x.shape)}")
    shape, inner = x.shape[:depth], tuple(x.shape[depth:])
    flat_index = torch.reshape(flat_indices(call, indices, shape), (-1,))
    flat = torch.reshape(x, (math.prod(shape), math.prod(inner)))
    rows = torch.reshape(updates, (flat_index.numel(), math.prod(inner)))
    spread = flat_index.reshape(-1, 1).expand(rows.shape)
    reduction = call.attr_text("reduction", "none")
    if reduction == "none":
        result = torch.scatter(flat, 0, spread, rows)
    else:
        result = torch.scatter_reduce(flat, 0, spread, rows, _REDUCE[reduction], include_self=True)
    return torch.reshape(result, tuple(x.shape))


@op("TensorScatter")
def tensor_scatter(call: OpCall) -> Tensor:
    """Writes one run of a cache for each batch row; ``circular`` wraps round at its end."""
    past, update = call.x(0), call.x(1)
    axis = call.axis(call.attr_int("axis", -2), past.dim())
    length, size = update.shape[axis], past.shape[axis]
    places = torch.arange(length)
    starts = call.x(2).to(torch.int64) if call.given(2) else torch.zeros(past.shape[0], dtype=torch.int64)
    rows = torch.add(torch.reshape(starts, (-1, 1)), places.reshape(1, -1))
    if call.attr_text("mode", "linear") == "circular":
        rows = torch.remainder(rows, size)
    view = [1] * past.dim()
    view[0], view[axis] = past.shape[0], length
    spread = torch.broadcast_to(torch.reshape(rows, tuple(view)), tuple(update.shape))
    return torch.scatter(past, axis, spread, update)


@op("OneHot")
def one_hot(call: OpCall) -> Tensor:
    """Indices outside of the depth give a row of the off value alone."""
    indices, depth, values = call.x(0), call.const_int(1, "depth"), call.x(2)
    axis = call.axis(call.attr_int("axis", -1), indices.dim() + 1)
    call.check_size([*indices.shape, depth])
    if not indices.is_floating_point():
        indices = indices.to(torch.int64)
    hot = torch.unsqueeze(torch.where(indices < 0, torch.add(indices, depth), indices), axis)
    view = [1] * hot.dim()
    view[axis] = depth
    chosen = torch.eq(hot, torch.arange(depth).reshape(view).to(hot.dtype))
    return torch.where(chosen, torch.select(values, 0, 1), torch.select(values, 0, 0))


@op("Trilu", domain="com.microsoft")
@op("Trilu")
def trilu(call: OpCall) -> Tensor:
    """One triangle, the rest 0. [..., M, N]."""
    function = torch.triu if call.attr_int("upper", 1) else torch.tril
    x, diagonal = call.x(0), call.const_int(1, "k") if call.given(1) else 0
    return function(x, max(min(diagonal, 1 << 31), -(1 << 31)))


@op("Compress")
def compress(call: OpCall) -> Tensor:
    """What a condition keeps. [...] -> [kept], or [..., kept, ...] along ``axis``."""
    x, condition = call.x(0), call.x(1).to(torch.bool)
    if not is_constant(condition):
        return _chosen(call, x, condition)
    chosen = torch.nonzero(condition).reshape(-1)
    if not call.has("axis"):
        return select(torch.reshape(x, (x.numel(),)), 0, chosen)
    return select(x, call.axis(call.attr_int("axis"), x.dim()), chosen)


def _chosen(call: OpCall, x: Tensor, condition: Tensor) -> Tensor:
    """What a condition keeps that only a run tells: all of it, of which some counts. Along the first axis."""
    if not call.has("axis"):
        x = torch.reshape(x, (x.numel(),))
    elif call.axis(call.attr_int("axis"), x.dim()):
        raise call.refuse("its condition depends on the data, and chooses along another axis than the first")
    if condition.shape[0] != x.shape[0]:
        x = torch.narrow(x, 0, 0, condition.shape[0])
    return x[condition]


@op("NonZero")
def nonzero(call: OpCall) -> Tensor:
    """Places that are not 0; of what is known at run time all places, of which some count. [rank, count]."""
    x = call.x(0)
    if is_constant(x):
        return torch.nonzero(x.reshape(1) if x.dim() == 0 else x).t().contiguous()
    found = torch.nonzero(torch.reshape(x, (1,)) if x.dim() == 0 else x)
    return torch.transpose(found, 0, 1)


@op("Unique")
def unique(call: OpCall) -> Result:
    """Distinct values of a constant, with first places, inverse and counts."""
    x = call.const(0, "its input (the result has a data-dependent shape)")
    axis = call.axis(call.attr_int("axis"), x.dim()) if call.has("axis") else None
    flat = x if axis is not None else x.reshape(-1)
    values, inverse, counts = torch.unique(flat, return_inverse=True, return_counts=True, dim=axis or 0)
    places = torch.arange(inverse.numel())
    first = torch.full((counts.numel(),), inverse.numel()).scatter_reduce(0, inverse, places, "amin")
    if not call.attr_int("sorted", 1):
        order = torch.argsort(first)
        rank = torch.argsort(order)
        values, first, counts = values.index_select(axis or 0, order), first[order], counts[order]
        inverse = rank[inverse]
    return values, first, inverse, counts


@op("ReverseSequence")
def reverse_sequence(call: OpCall) -> Tensor:
    """Each row turned round up to its own length."""
    x, lengths = call.x(0), call.x(1).to(torch.int64)
    time, batch = call.attr_int("time_axis", 0), call.attr_int("batch_axis", 1)
    view_time, view_batch = [1] * x.dim(), [1] * x.dim()
    view_time[time], view_batch[batch] = x.shape[time], x.shape[batch]
    places = torch.arange(x.shape[time]).reshape(view_time)
    length = torch.reshape(lengths, tuple(view_batch))
    mirrored = torch.sub(torch.sub(length, 1), places)
    index = torch.where(mirrored >= 0, mirrored, places)
    return torch.gather(x, time, torch.broadcast_to(index, tuple(x.shape)))


@op("EyeLike")
def eye_like(call: OpCall) -> Tensor:
    """Ones on a diagonal, in the shape of the input."""
    rows, columns = call.x(0).shape
    call.check_size((rows, columns))
    dtype = TORCH_DTYPE[call.attr_int("dtype")] if call.has("dtype") else call.x(0).dtype
    offset = torch.arange(columns).reshape(1, -1) - torch.arange(rows).reshape(-1, 1)
    return (offset == call.attr_int("k", 0)).to(dtype)
