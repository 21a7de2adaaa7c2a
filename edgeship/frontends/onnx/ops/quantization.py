"""Quantization: constants become float weights whose integers are remembered, activations stay on their grids.

What a grid of one constant scale cannot express (a scale for each channel, or one that the data decide) is imported as
the float arithmetic that it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from onnx import TensorProto

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.constants import Integers
from edgeship.frontends.onnx.dtypes import ELEM_TYPE, FLOAT8, SUB_BYTE_BITS, TORCH_DTYPE, integer_range
from edgeship.frontends.onnx.ops.convolution import convolve, integer_convolve
from edgeship.frontends.onnx.ops.creation import tagged, to_float8
from edgeship.frontends.onnx.registry import Result, op
from edgeship.frontends.onnx.values import Grid, Picked, Quantized, Rounded, Scaled, is_constant

Tensor = torch.Tensor

_GRIDS = (TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16)


@op("QuantizeLinear")
def quantize_linear(call: OpCall) -> Tensor | Quantized:
    """Divided, rounded half to even, shifted, saturated.

    Any shape; scales are one number, one a channel along ``axis``, or one a block.
    """
    x, scale = call.x(0), call.x(1)
    elem_type = TensorProto.UINT8
    if call.given(2):
        elem_type = call.elem_type(2)
    elif call.attr_int("output_dtype", 0):
        elem_type = call.attr_int("output_dtype")
    grid = grid_of(call, 1, 2, elem_type)
    if grid is not None and x.dtype == torch.float32 and not is_constant(x):
        return call.quantize(x, grid)
    dtype = TORCH_DTYPE[elem_type]
    wide = x.to(torch.float32) if not x.is_floating_point() or x.dtype in (torch.float16, torch.bfloat16) else x
    scale = _spread(call, scale, x).to(wide.dtype)
    scaled = torch.div(wide, scale)
    if dtype in FLOAT8:
        return to_float8(scaled, dtype, saturate=bool(call.attr_int("saturate", 1)))
    rounded = torch.round(scaled)
    if call.given(2):
        rounded = torch.add(rounded, _spread(call, call.x(2), x).to(wide.dtype))
    low, high = integer_range(elem_type)
    result = torch.clamp(rounded, low, high)
    if dtype in (torch.uint16, torch.uint32):
        result = result.to(torch.int64)
    return tagged(call, result.to(dtype), elem_type)


@op("DequantizeLinear")
def dequantize_linear(call: OpCall) -> Tensor:
    """`(x - zero_point) * scale`; of constants it folds to a float weight.

    Any shape; scales as in `quantize_linear`.
    """
    held = call.quantized(0)
    if held is not None and held.grid == grid_of(call, 1, 2, held.grid.elem_type):
        return held.value
    table = _table(call)
    if table is not None:
        return table
    x, scale = call.x(0), call.x(1)
    result_type = TORCH_DTYPE[call.attr_int("output_dtype")] if call.attr_int("output_dtype", 0) else scale.dtype
    wide = torch.float32 if scale.dtype.itemsize < 4 else scale.dtype
    value = x.to(wide)
    if call.given(2):
        value = torch.sub(value, _spread(call, call.x(2), x).to(wide))
    result = torch.mul(value, _spread(call, scale, x).to(wide)).to(result_type)
    if is_constant(x) and is_constant(scale) and not x.is_floating_point():
        zero = call.x(2) if call.given(2) else torch.zeros_like(scale)
        call.constants.remember(result, Integers(scale, zero, call.elem_type(0)))
    return result


def _table(call: OpCall) -> Tensor | None:
    """Rows of a constant table of integers with one scale: rows of the float table, [..., columns]; None of others."""
    source = call.inputs[0]
    picked = call.dynamic.get(source) if isinstance(source, Tensor) and not is_constant(source) else None
    scale, zero = call.x(1), call.optional(2)
    fits = isinstance(picked, Picked) and is_constant(scale) and is_constant(zero) and scale.numel() == 1
    if not fits or call.attr_int("block_size", 0):
        return None
    assert isinstance(picked, Picked)
    point = torch.zeros((), dtype=torch.int32) if zero is None else zero.reshape(())
    value = torch.mul(torch.sub(picked.table.to(torch.float32), point.to(torch.float32)), scale.reshape(()).float())
    call.constants.name(value, call.constants.name_of(picked.table))
    elem_type = call.elem_types.get(picked.table, ELEM_TYPE[picked.table.dtype])
    call.constants.remember(value, Integers(scale.reshape(()), point, elem_type))
    call.constants.mark_weight(value)
    return F.embedding(picked.indices.to(torch.int64), value)


def grid_of(call: OpCall, scale_index: int, zero_index: int, elem_type: int) -> Grid | None:
    """The grid that two constant inputs give an activation; None where it is not one scale of 8 or 16 bits."""
    if elem_type not in _GRIDS or call.attr_int("block_size", 0):
        return None
    scale = call.x(scale_index)
    zero = call.optional(zero_index)
    if (
        not is_constant(scale)
        or scale.numel() != 1
        or not is_constant(zero)
        or (zero is not None and zero.numel() != 1)
    ):
        return None
    number = float(scale.reshape(-1)[0].item())
    if not 0 < number < float("inf"):
        raise call.broken(f"its scale is {number}")
    return Grid(number, 0 if zero is None else int(zero.reshape(-1)[0].item()), elem_type)


def _spread(call: OpCall, parameter: Tensor, x: Tensor) -> Tensor:
    """A scale or zero point in a shape that broadcasts over ``x``: one for all, per axis, or per block."""
    if parameter.numel() == 1 and parameter.dim() <= 1:
        return torch.reshape(parameter, ())
    axis = call.axis(call.attr_int("axis", 1), x.dim())
    block = call.attr_int("block_size", 0)
    if parameter.dim() == 1 and not block:
        view = [1] * x.dim()
        view[axis] = -1
        return torch.reshape(parameter, tuple(view))
    if parameter.dim() != x.dim() or not block:
        raise call.broken(f"a scale of shape {list(parameter.shape)} for {list(x.shape)}")
    repeated = torch.repeat_interleave(parameter, block, axis)
    return torch.narrow(repeated, axis, 0, x.shape[axis])


def restored(call: OpCall, index: int, *, axis: int = 0, scale: int | None = None, zero: int | None = None) -> Tensor:
    """The numbers behind integers at ``index``. Any shape.

    Args:
        axis: of a scale for each channel. scale, zero: inputs with scale and zero point; by default the two after it.
    """
    scale_index = index + 1 if scale is None else scale
    zero_index = index + 2 if zero is None else zero
    held = call.quantized(index)
    if held is not None and held.grid == grid_of(call, scale_index, zero_index, held.grid.elem_type):
        return held.value
    x, factor = call.x(index), call.x(scale_index)
    point = call.x(zero_index) if call.given(zero_index) else torch.zeros(factor.shape, dtype=torch.int32)
    view = [1] * x.dim()
    if factor.numel() > 1:
        view[axis] = factor.numel()
    value = torch.sub(x.to(torch.float32), torch.reshape(point, tuple(view)).to(torch.float32))
    result = torch.mul(value, torch.reshape(factor, tuple(view)).to(torch.float32))
    if is_constant(x) and is_constant(factor) and is_constant(point):
        call.constants.name(result, call.constants.name_of(x))
        call.constants.remember(result, Integers(factor, point, call.elem_type(index)))
    return result


def restored_input(call: OpCall, index: int, scale: int, zero: int) -> Tensor:
    """The numbers behind an activation in integers: where the data at hand gave the scale, what was rounded. Any shape.

    Args:
        scale, zero: inputs with its scale and zero point.
    """
    source = call.inputs[index]
    known = call.dynamic.get(source) if isinstance(source, Tensor) and not is_constant(source) else None
    if isinstance(known, Rounded):
        call.note_dynamic()
        return known.value
    return restored(call, index, scale=scale, zero=zero)


def rounded(call: OpCall, value: Tensor, scale_index: int) -> Tensor | Quantized:
    """``value`` on the grid of the inputs at ``scale_index`` and after it. Any shape."""
    zero = call.x(scale_index + 1)
    elem_type = call.elem_type(scale_index + 1)
    grid = grid_of(call, scale_index, scale_index + 1, elem_type)
    if grid is not None and not is_constant(value):
        return call.quantize(value, grid)
    low, high = integer_range(elem_type)
    whole = torch.add(torch.round(torch.div(value, call.x(scale_index))), zero.to(value.dtype))
    return torch.clamp(whole, low, high).to(zero.dtype)


def scaled_bias(call: OpCall, index: int, x_scale: int, weight_scale: int) -> Tensor:
    """An int32 bias as the number it stands for. [M]."""
    scale = torch.mul(call.x(x_scale).to(torch.float64), call.x(weight_scale).to(torch.float64))
    bias = call.x(index)
    result = torch.mul(bias.to(torch.float64), torch.reshape(scale, (-1,)) if scale.dim() else scale).to(torch.float32)
    if is_constant(result):
        call.constants.name(result, call.constants.name_of(bias))
        call.constants.mark_weight(result)
    return result


def _on_grids(call: OpCall) -> bool:
    """Whether an operator with an activation, a weight and an output has a constant grid for each."""
    held = call.quantized(0)
    if held is None or held.grid != grid_of(call, 1, 2, held.grid.elem_type):
        return False
    constant = all(is_constant(call.inputs[index]) for index in (3, 4, 5))
    return constant and grid_of(call, 6, 7, call.elem_type(7)) is not None


@op("DynamicQuantizeLinear")
def dynamic_quantize_linear(call: OpCall) -> Result:
    """To uint8 by the range of the data at hand."""
    x = call.x(0)
    low = torch.clamp(torch.amin(x), max=0.0)
    high = torch.clamp(torch.amax(x), min=0.0)
    scale = torch.div(torch.sub(high, low), 255.0)
    zero = torch.round(torch.clamp(torch.div(torch.neg(low), scale), 0.0, 255.0))
    values = torch.clamp(torch.add(torch.round(torch.div(x, scale)), zero), 0.0, 255.0)
    integers = values.to(torch.uint8)
    if not is_constant(x):
        call.dynamic[integers] = Rounded(x, scale)
        call.dynamic[scale] = Scaled(scale, torch.ones(()))
    return integers, scale, zero.to(torch.uint8)


@op("QLinearMatMul")
def quantized_matmul(call: OpCall) -> Tensor | Quantized:
    """Between constant grids a float product; else exact integer sums, rescaled once.

    [..., M, K] x [K, N] -> [..., M, N].
    """
    if _on_grids(call) and call.x(3).dim() == 2:
        matrix = restored(call, 3, axis=1)
        call.constants.mark_weight(matrix)
        weight = call.constants.derive(matrix, "transposed", lambda t: t.t().contiguous())
        return rounded(call, F.linear(restored(call, 0), weight), 6)
    a = _centred(call.x(0), call.x(2), row=True)
    b = _centred(call.x(3), call.x(5), row=False)
    scale = torch.mul(_as_row(call.x(1)).to(torch.float64), call.x(4).to(torch.float64))
    product = torch.mul(torch.matmul(a, b), torch.div(scale, call.x(6).to(torch.float64)))
    return _requantized(call, product, 7)


@op("QLinearConv")
def quantized_conv(call: OpCall) -> Tensor | Quantized:
    """Between constant grids a float convolution; else exact integer sums, rescaled once.

    [N, C, ...] -> [N, M, ...].
    """
    if _on_grids(call) and is_constant(call.optional(8)):
        weight = restored(call, 3)
        call.constants.mark_weight(weight)
        bias = scaled_bias(call, 8, 1, 4) if call.given(8) else None
        return rounded(call, convolve(call, restored(call, 0), weight, bias), 6)
    x = torch.sub(call.x(0).to(torch.int32), call.x(2).to(torch.int32))
    weight, zero, scale = call.x(3).to(torch.int32), call.x(5).to(torch.int32), call.x(4).to(torch.float64)
    weight = torch.sub(weight, torch.reshape(zero, (-1,) + (1,) * (weight.dim() - 1)) if zero.dim() else zero)
    sums = integer_convolve(call, x, weight)
    channel = (-1,) + (1,) * (x.dim() - 2)
    if call.given(8):
        sums = torch.add(sums, torch.reshape(call.x(8).to(torch.float64), channel))
    factor = torch.div(torch.mul(scale, call.x(1).to(torch.float64)), call.x(6).to(torch.float64))
    return _requantized(call, torch.mul(sums, torch.reshape(factor, channel) if factor.dim() else factor), 7)


def _centred(x: Tensor, zero: Tensor, *, row: bool) -> Tensor:
    """``x`` less its zero point, in float64; with ``row`` the zero points are one a row."""
    return torch.sub(x.to(torch.float64), (_as_row(zero) if row else zero).to(torch.float64))


def _as_row(x: Tensor) -> Tensor:
    """A parameter for each row of the left matrix."""
    return torch.reshape(x, (-1, 1)) if x.dim() == 1 and x.numel() > 1 else x


def _requantized(call: OpCall, value: Tensor, zero_index: int) -> Tensor:
    """``value`` of any shape, rounded, shifted by the zero point and saturated."""
    zero = call.x(zero_index)
    elem_type = call.elem_type(zero_index)
    if elem_type in SUB_BYTE_BITS or zero.dtype in FLOAT8:
        raise call.refuse("its output is neither int8 nor uint8")
    low, high = integer_range(elem_type)
    return torch.clamp(torch.add(torch.round(value), zero.to(value.dtype)), low, high).to(zero.dtype)
