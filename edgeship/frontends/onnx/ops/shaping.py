"""Operators that change a shape or the place of elements, and compute nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.dtypes import SPARSELY_SUPPORTED
from edgeship.frontends.onnx.registry import Result, op
from edgeship.frontends.onnx.values import Value, is_constant

Tensor = torch.Tensor


@op("Identity")
def identity(call: OpCall) -> Value:
    """The value itself, a sequence too."""
    return call.inputs[0] if call.inputs else call.x(0)


@op("Shape")
def shape(call: OpCall) -> Tensor:
    """Known at import, all of it or a range of axes."""
    sizes = list(call.x(0).shape)
    end = call.attr_int("end", len(sizes)) if call.opset >= 15 else len(sizes)
    start = call.attr_int("start", 0) if call.opset >= 15 else 0
    return torch.tensor(sizes[start:end], dtype=torch.int64)


@op("Size")
def size(call: OpCall) -> Tensor:
    """Known at import. A scalar."""
    return torch.tensor(call.x(0).numel(), dtype=torch.int64)


@op("Reshape")
def reshape_attribute(call: OpCall) -> Tensor:
    """Before opset 5 the shape is an attribute."""
    return _reshape(call, call.attr_ints("shape"))


@op("Reshape", since=5)
def reshape(call: OpCall) -> Tensor:
    """0 copies an axis, -1 takes what is left."""
    return _reshape(call, call.const_ints(1, "the shape"))


def _reshape(call: OpCall, wanted: Sequence[int]) -> Tensor:
    """``x`` in the shape ``wanted``, where 0 copies a size (unless ``allowzero``) and -1 is what is left."""
    x = call.x(0)
    sizes = list(wanted)
    if not call.attr_int("allowzero", 0):
        for index, value in enumerate(sizes):
            if value == 0:
                if index >= x.dim():
                    raise call.broken(f"shape {list(wanted)} copies axis {index}, the input has {x.dim()}")
                sizes[index] = x.shape[index]
    if -1 in sizes:
        known = math.prod(value for value in sizes if value != -1)
        sizes[sizes.index(-1)] = x.numel() // known if known else 0
    if any(value < 0 for value in sizes) or math.prod(sizes) != x.numel():
        raise call.broken(f"a tensor of shape {list(x.shape)} cannot have the shape {list(wanted)}")
    return torch.reshape(x, tuple(sizes))


@op("Flatten")
def flatten(call: OpCall) -> Tensor:
    """To a matrix. [a, b, c, d] -> [a * b, c * d], cut in front of ``axis``."""
    x = call.x(0)
    axis = call.attr_int("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if not 0 <= axis <= x.dim():
        raise call.broken(f"axis {axis} does not exist in a tensor of rank {x.dim()}")
    return torch.reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


@op("Squeeze")
def squeeze(call: OpCall) -> Tensor:
    """Without the given axes of size 1, or all of them."""
    x = call.x(0)
    axes = call.ints_from("axes", 1)
    if axes is None:
        axes = [axis for axis, value in enumerate(x.shape) if value == 1]
    axes = [call.axis(axis, x.dim()) for axis in axes]
    if any(x.shape[axis] != 1 for axis in axes):
        raise call.broken(f"axes {axes} of shape {list(x.shape)} are not all 1")
    return torch.reshape(x, tuple(value for axis, value in enumerate(x.shape) if axis not in axes))


@op("Unsqueeze")
def unsqueeze(call: OpCall) -> Tensor:
    """With axes of size 1 more."""
    x = call.x(0)
    axes = call.ints_from("axes", 1) or []
    rank = x.dim() + len(axes)
    places = {call.axis(axis, rank) for axis in axes}
    if len(places) != len(axes):
        raise call.broken(f"axes {axes} name one axis twice")
    sizes = iter(x.shape)
    return torch.reshape(x, tuple(1 if axis in places else next(sizes) for axis in range(rank)))


@op("Expand")
def expand(call: OpCall) -> Tensor:
    """Broadcast to a constant shape, both ways."""
    x, wanted = call.x(0), call.const_ints(1, "the shape")
    if any(value < 0 for value in wanted):
        raise call.broken(f"the shape is {wanted}")
    sizes = np.broadcast_shapes(tuple(x.shape), tuple(wanted))
    call.check_size(sizes)
    return torch.broadcast_to(x, sizes)


@op("Tile")
def tile_axis(call: OpCall) -> Tensor:
    """Before opset 6: along one axis."""
    x = call.x(0)
    repeats = [1] * x.dim()
    repeats[call.axis(call.const_int(2), x.dim())] = call.const_int(1)
    return torch.tile(x, tuple(repeats))


@op("Tile", since=6)
def tile(call: OpCall) -> Tensor:
    """Along every axis."""
    x, repeats = call.x(0), call.const_ints(1, "repeats")
    if len(repeats) != x.dim():
        raise call.broken(f"it has {len(repeats)} repeats for {x.dim()} axes")
    call.check_size([a * b for a, b in zip(x.shape, repeats, strict=True)])
    return torch.tile(x, tuple(repeats))


@op("Transpose")
def transpose(call: OpCall) -> Tensor:
    """By default the axes in reverse."""
    x = call.x(0)
    perm = call.attr_ints("perm", tuple(reversed(range(x.dim()))))
    return torch.permute(x, tuple(perm))


@op("Concat")
def concat(call: OpCall) -> Tensor:
    """Along one axis."""
    tensors = call.tensors()
    axis = call.attr_int("axis", 1 if call.opset < 4 else None)
    return torch.cat(tensors, call.axis(axis, tensors[0].dim()))


@op("Split")
def split(call: OpCall) -> Result:
    """Into given sizes, or into equal parts."""
    x = call.x(0)
    axis = call.axis(call.attr_int("axis", 0), x.dim())
    sizes = call.ints_from("split", 1)
    if sizes is None:
        parts = call.attr_int("num_outputs", call.n_outputs) if call.opset >= 18 else call.n_outputs
        if parts < 1:
            raise call.broken(f"it splits into {parts} parts")
        # Before opset 18 the parts are equal; since then the last one may be smaller.
        step = -(-x.shape[axis] // parts)
        sizes = [step] * (parts - 1) + [x.shape[axis] - step * (parts - 1)]
    if sum(sizes) != x.shape[axis] or any(value < 0 for value in sizes):
        raise call.broken(f"parts {sizes} do not make up {x.shape[axis]} elements")
    return tuple(torch.split(x, sizes, axis))


@op("Slice")
def slice_attributes(call: OpCall) -> Tensor:
    """Before opset 10 the bounds are attributes. Any shape."""
    starts, ends = call.attr_ints("starts"), call.attr_ints("ends")
    return _slice(call, starts, ends, call.attr_ints("axes", tuple(range(len(starts)))), [1] * len(starts))


@op("Slice", since=10)
def slice_inputs(call: OpCall) -> Tensor:
    """Constant bounds and steps. Any shape."""
    starts, ends = call.const_ints(1, "starts"), call.const_ints(2, "ends")
    axes = call.const_ints(3, "axes") if call.given(3) else list(range(len(starts)))
    steps = call.const_ints(4, "steps") if call.given(4) else [1] * len(starts)
    return _slice(call, starts, ends, axes, steps)


def _slice(
    call: OpCall, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int], steps: Sequence[int]
) -> Tensor:
    x = call.x(0)
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise call.broken("starts, ends, axes and steps do not agree")
    index = [slice(None)] * x.dim()
    flipped = []
    for start, end, where, step in zip(starts, ends, axes, steps, strict=True):
        axis = call.axis(where, x.dim())
        chosen = _chosen(start, end, step, x.shape[axis])
        if step > 0:
            index[axis] = slice(chosen.start, max(chosen.stop, chosen.start), step)
        else:
            # torch has no negative steps: take the same elements forwards, then turn them round.
            flipped.append(axis)
            index[axis] = slice(chosen[-1], chosen[0] + 1, -step) if chosen else slice(0, 0, 1)
    whole = all(part == slice(0, n, 1) or part == slice(None) for part, n in zip(index, x.shape, strict=True))
    result = x if whole else x[tuple(index)]
    return torch.flip(result, flipped) if flipped else result


def _chosen(start: int, end: int, step: int, size: int) -> range:
    """Indices that a slice picks. Unlike Python, ONNX clamps a start below ``-size`` to 0 for negative steps."""
    if step > 0:
        return range(*slice(start, end, step).indices(size))
    first = min(max(start + size if start < 0 else start, 0), size - 1)
    last = min(max(end + size if end < 0 else end, -1), size - 1)
    return range(first, last, step)


@op("Pad")
def pad_attributes(call: OpCall) -> Tensor:
    """Before opset 11 the pads are attributes. Any rank; a begin and an end for each axis."""
    pads = call.attr_ints("pads" if call.opset >= 2 else "paddings")
    x = call.x(0)
    return pad_tensor(call, x, pads, call.attr_text("mode", "constant"), call.attr_float("value", 0.0))


@op("Pad", since=11)
def pad(call: OpCall) -> Tensor:
    """Constant pads; the value may depend on the data. Any rank; a begin and an end for each axis, or for ``axes``."""
    x = call.x(0)
    pads, mode = call.const_ints(1, "pads"), call.attr_text("mode", "constant")
    if call.given(3):
        axes = [call.axis(axis, x.dim()) for axis in call.const_ints(3, "axes")]
        if len(pads) != 2 * len(axes):
            raise call.broken(f"{len(pads)} pads for {len(axes)} axes")
        spread = [0] * (2 * x.dim())
        for place, axis in enumerate(axes):
            spread[axis], spread[axis + x.dim()] = pads[place], pads[place + len(axes)]
        pads = spread
    value = call.optional(2)
    if value is None or mode != "constant":
        return pad_tensor(call, x, pads, mode, 0.0)
    if is_constant(value):
        return pad_tensor(call, x, pads, mode, value.reshape(-1)[0].item())
    inside = pad_tensor(call, torch.ones(x.shape, dtype=torch.bool), pads, mode, 0.0)
    return torch.where(inside, pad_tensor(call, x, pads, mode, 0.0), value.reshape(()))


def pad_tensor(call: OpCall, x: Tensor, pads: Sequence[int], mode: str, value: float) -> Tensor:
    """Pad as ONNX does: ``pads`` has all begins, then all ends; a negative one crops. Any rank."""
    rank = x.dim()
    if len(pads) != 2 * rank:
        raise call.broken(f"{len(pads)} pads for {rank} axes")
    begins, ends = list(pads[:rank]), list(pads[rank:])
    call.check_size([n + a + b for n, a, b in zip(x.shape, begins, ends, strict=True)])
    # Rows that values chose are filled up to a fixed number, however many are missing here.
    if not any(pads) and call.chosen.rows(x) is None:
        return x
    if mode == "constant":
        widths = [width for axis in reversed(range(rank)) for width in (begins[axis], ends[axis])]
        if x.dtype in SPARSELY_SUPPORTED or x.dtype == torch.bool:
            stand_in = torch.int64 if x.dtype != torch.bool else torch.uint8
            return F.pad(x.to(stand_in), widths, "constant", value).to(x.dtype)
        return F.pad(x, widths, "constant", value)
    if _has_kernel(x, begins, ends, mode):
        widths = [width for axis in reversed(range(2, rank)) for width in (begins[axis], ends[axis])]
        return F.pad(x, widths, "reflect" if mode == "reflect" else "replicate")
    for axis, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        if begin or end:
            x = _pad_axis(call, x, axis, begin, end, mode)
    return x


def _has_kernel(x: Tensor, begins: Sequence[int], ends: Sequence[int], mode: str) -> bool:
    """Whether torch pads this in one call: spatial axes only, and a reflection shorter than its axis."""
    if x.dim() not in (3, 4, 5) or mode not in ("edge", "reflect") or not x.is_floating_point():
        return False
    most = [max(a, b) for a, b in zip(begins, ends, strict=True)]
    fits = all(width < n for width, n in zip(most[2:], x.shape[2:], strict=True)) if mode == "reflect" else True
    return fits and most[:2] == [0, 0] and min(*begins, *ends) >= 0


def _pad_axis(call: OpCall, x: Tensor, axis: int, begin: int, end: int, mode: str) -> Tensor:
    """The modes that repeat elements, as a selection with known indices."""
    n = x.shape[axis]
    places = torch.arange(-begin, n + end)
    if n == 0 or mode not in ("edge", "reflect", "wrap"):
        raise call.broken(f'mode "{mode}" cannot pad {n} elements')
    if mode == "edge":
        chosen = places.clamp(0, n - 1)
    elif mode == "wrap":
        chosen = places % n
    else:
        period = max(2 * (n - 1), 1)
        chosen = places % period
        chosen = torch.where(chosen < n, chosen, period - chosen) if n > 1 else torch.zeros_like(places)
    return torch.index_select(x, axis, chosen)


@op("DepthToSpace")
def depth_to_space(call: OpCall) -> Tensor:
    """Blocks out of channels, in either order."""
    x, block = call.x(0), call.attr_int("blocksize")
    n, c, h, w = x.shape
    if block < 1 or c % (block * block):
        raise call.broken(f"{c} channels with a block of {block}")
    if call.attr_text("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    x = torch.reshape(x, (n, block, block, c // block**2, h, w))
    return torch.reshape(torch.permute(x, (0, 3, 4, 1, 5, 2)), (n, c // block**2, h * block, w * block))


@op("SpaceToDepth")
def space_to_depth(call: OpCall) -> Tensor:
    """Blocks into channels, in either order."""
    x, block = call.x(0), call.attr_int("blocksize")
    n, c, h, w = x.shape
    if block < 1 or h % block or w % block:
        raise call.broken(f"a picture of {h}x{w} with a block of {block}")
    if call.attr_text("mode", "DCR") == "CRD":
        return F.pixel_unshuffle(x, block)
    x = torch.reshape(x, (n, c, h // block, block, w // block, block))
    return torch.reshape(torch.permute(x, (0, 3, 5, 1, 2, 4)), (n, c * block**2, h // block, w // block))
