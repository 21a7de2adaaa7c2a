"""Convolutions and transposed convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.ops.linear import integer_weight
from edgeship.frontends.onnx.ops.windows import pads_list, windows
from edgeship.frontends.onnx.registry import op
from edgeship.frontends.onnx.values import Product, Rounded, is_constant

Tensor = torch.Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@op("Conv")
def conv(call: OpCall) -> Tensor:
    """The weight is [out, in / group, *kernel]."""
    return convolve(call, call.x(0), call.weight(1), call.optional_weight(2))


def convolve(call: OpCall, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution with the attributes of ``call``; uneven padding becomes a pad in front.

    ``x`` [N, C, ...], ``weight`` [M, C / groups, ...kernel], ``bias`` [M] -> [N, M, ...].
    """
    rank = _spatial_rank(call, x, weight)
    place = windows(call, tuple(x.shape[2:]), _kernel(call, weight))
    padding = place.begins
    if place.begins != place.declared_ends:
        x, padding = F.pad(x, pads_list(place.begins, place.declared_ends)), (0,) * rank
    return _CONV[rank](x, weight, bias, place.strides, padding, place.dilations, call.attr_int("group", 1))


@op("ConvTranspose")
def conv_transpose(call: OpCall) -> Tensor:
    """The weight is [in, out / group, *kernel]; uneven cropping follows the product."""
    x, weight, bias = call.x(0), call.weight(1), call.optional_weight(2)
    rank = _spatial_rank(call, x, weight)
    kernel = _kernel(call, weight)
    strides = tuple(call.attr_ints("strides", (1,) * rank))
    dilations = tuple(call.attr_ints("dilations", (1,) * rank))
    extra = call.attr_ints("output_padding", (0,) * rank)
    if min((*strides, *dilations, *kernel)) < 1 or not len(strides) == len(dilations) == len(extra) == rank:
        raise call.broken("strides, dilations or output_padding do not fit its input")
    full = [strides[axis] * (x.shape[2 + axis] - 1) + dilations[axis] * (kernel[axis] - 1) + 1 for axis in range(rank)]
    begins, ends = _transposed_pads(call, x, full, strides, extra)
    outputs = [full[axis] + extra[axis] - begins[axis] - ends[axis] for axis in range(rank)]
    call.check_size((*x.shape[:1], *outputs))
    function, group = _CONV_TRANSPOSE[rank], call.attr_int("group", 1)
    short = all(extra[axis] < max(strides[axis], dilations[axis]) for axis in range(rank))
    if begins == ends and short and min(begins) >= 0:
        return function(x, weight, bias, strides, tuple(begins), tuple(extra), group, dilations)
    result = function(x, weight, None, strides, 0, 0, group, dilations)
    grow = tuple(more - end for more, end in zip(extra, ends, strict=True))
    cropped = F.pad(result, pads_list(tuple(-begin for begin in begins), grow))
    return cropped if bias is None else torch.add(cropped, torch.reshape(bias, (-1, *(1,) * rank)))


def _transposed_pads(
    call: OpCall, x: Tensor, full: Sequence[int], strides: Sequence[int], extra: Sequence[int]
) -> tuple[list[int], list[int]]:
    """What is cropped from the full result, from ``output_shape``, ``auto_pad`` or ``pads``."""
    rank = len(full)
    auto = call.attr_text("auto_pad", "NOTSET")
    wanted: list[int] | None = None
    if call.has("output_shape"):
        wanted = call.attr_ints("output_shape")[-rank:]
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        # SAME asks for this size, whatever the kernel is.
        wanted = [x.shape[2 + axis] * strides[axis] for axis in range(rank)]
    if wanted is None:
        none = [0] * (2 * rank)
        pads = none if auto == "VALID" else call.attr_ints("pads", none)
        if len(pads) != 2 * rank:
            raise call.broken(f"{len(pads)} pads for {rank} spatial axes")
        return pads[:rank], pads[rank:]
    begins: list[int] = []
    ends: list[int] = []
    for axis in range(rank):
        total = full[axis] + extra[axis] - wanted[axis]
        begin = total // 2 if auto == "SAME_UPPER" else total - total // 2
        if total < 0:
            # An output larger than the full result grows at its end only.
            begin = 0
        begins.append(begin)
        ends.append(total - begin)
    return begins, ends


@op("ConvInteger")
def conv_integer(call: OpCall) -> Tensor:
    """Products of centred 8-bit integers, summed in int32. [N, C, ...] -> [N, M, ...]."""
    x, weight = call.x(0).to(torch.int32), call.x(1).to(torch.int32)
    if call.given(2):
        x = torch.sub(x, call.x(2).to(torch.int32))
    if call.given(3):
        zero = call.x(3).to(torch.int32)
        weight = torch.sub(weight, zero.reshape((-1,) + (1,) * (weight.dim() - 1)) if zero.dim() else zero)
    result = integer_convolve(call, x, weight).to(torch.int32)
    source = call.dynamic.get(call.x(0)) if not is_constant(call.inputs[0]) else None
    if isinstance(source, Rounded) and is_constant(weight):

        def make(factor: Tensor) -> Tensor:
            """The convolution with float weights, once the scale behind it is known: one, or one a channel."""
            channels = factor.reshape((-1,) + (1,) * (weight.dim() - 1)) if factor.numel() > 1 else factor.reshape(())
            return convolve(call, source.value, integer_weight(call, weight, channels), None)

        call.dynamic[result] = Product(source.scale, make)
    return result


def integer_convolve(call: OpCall, x: Tensor, weight: Tensor) -> Tensor:
    """Exact for int8 products: float64 holds every sum of fewer than 2^37 of them. Shapes as in `convolve`."""
    return convolve(call, x.to(torch.float64), weight.to(torch.float64), None)


def _kernel(call: OpCall, weight: Tensor) -> tuple[int, ...]:
    """The sizes of ``weight`` [M, C / groups, ...kernel] behind its first two axes, checked against the attribute."""
    kernel = tuple(call.attr_ints("kernel_shape", tuple(weight.shape[2:])))
    if kernel != tuple(weight.shape[2:]):
        raise call.broken(f"kernel_shape {list(kernel)} is not that of its weight {list(weight.shape)}")
    return kernel


def _spatial_rank(call: OpCall, x: Tensor, weight: Tensor) -> int:
    """How many axes of space ``x`` [N, C, ...] has: 1, 2 or 3."""
    rank = x.dim() - 2
    if rank not in _CONV:
        raise call.refuse(f"{rank} spatial axes; 1, 2 and 3 are imported")
    if weight.dim() != x.dim() or x.dtype != weight.dtype:
        raise call.broken(f"a weight {list(weight.shape)} for an input {list(x.shape)}, or of another type")
    return rank
