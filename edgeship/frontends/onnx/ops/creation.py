"""Constants, ranges, window functions and casts."""

from __future__ import annotations

import math

import torch
from onnx import TensorProto

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.dtypes import FLOAT8, SUB_BYTE_BITS, integer_range, torch_dtype
from edgeship.frontends.onnx.registry import op
from edgeship.frontends.onnx.values import Product, is_constant

Tensor = torch.Tensor
# The distance of an 8-bit float's two largest numbers; 8192 in those with five bits of exponent.
LAST_STEPS = {torch.float8_e4m3fn: 32.0, torch.float8_e4m3fnuz: 16.0}


@op("Constant")
def constant(call: OpCall) -> Tensor:
    """The value in the file. Any shape."""
    if call.has("value"):
        return tagged(call, call.attr_tensor("value"), call.attr_elem_type("value"))
    if call.has("sparse_value"):
        return call.attr_tensor("sparse_value")
    if call.has("value_float"):
        return torch.tensor(call.attr_float("value_float"), dtype=torch.float32)
    if call.has("value_floats"):
        return torch.tensor(call.attr_floats("value_floats"), dtype=torch.float32)
    if call.has("value_int"):
        return torch.tensor(call.attr_int("value_int"), dtype=torch.int64)
    if call.has("value_ints"):
        return torch.tensor(call.attr_ints("value_ints"), dtype=torch.int64)
    if call.has("value_string") or call.has("value_strings"):
        raise call.refuse("it holds strings, which have no torch dtype")
    raise call.broken("it has no value")


@op("ConstantOfShape")
def constant_of_shape(call: OpCall) -> Tensor:
    """One value, spread over a constant shape without copying it."""
    shape = tuple(call.const_ints(0, "the shape"))
    call.check_size(shape)
    value = call.attr_tensor("value").reshape(()) if call.has("value") else torch.tensor(0.0)
    return value.expand(shape)


@op("Range")
def arange(call: OpCall) -> Tensor:
    """`start + i * delta`, computed wide and rounded once. [count]."""
    start, limit, delta = (call.const(index, name) for index, name in enumerate(("start", "limit", "delta")))
    first, last, step = start.item(), limit.item(), delta.item()
    if step == 0:
        raise call.broken("delta is 0")
    count = max(math.ceil((last - first) / step), 0)
    call.check_size((count,))
    wide = torch.float64 if start.is_floating_point() else torch.int64
    return (torch.arange(count, dtype=wide) * step + first).to(start.dtype)


@op("Cast")
def cast(call: OpCall) -> Tensor:
    """To the type in attribute `to`. Any shape."""
    return _cast(call, call.attr_int("to"))


@op("CastLike")
def cast_like(call: OpCall) -> Tensor:
    """To the type of the second input. Any shape."""
    return _cast(call, call.elem_type(1))


def _cast(call: OpCall, elem_type: int) -> Tensor:
    """Input 0 in another type, element by element."""
    x = call.x(0)
    dtype = torch_dtype(elem_type, call.where)
    if elem_type in SUB_BYTE_BITS:
        return tagged(call, _to_few_bits(x, elem_type), elem_type)
    if dtype in FLOAT8:
        return to_float8(x, dtype, saturate=bool(call.attr_int("saturate", 1)))
    if dtype == torch.bool and x.dtype in FLOAT8:
        x = x.to(torch.float32)
    if dtype == torch.float64 and not is_constant(x):
        # No engine here computes in double precision; constants keep it until they meet the graph.
        dtype = torch.float32
    # `to` on an equal dtype hands back its argument, which is what we want.
    result = x.to(dtype)
    if dtype.is_floating_point and not is_constant(x) and isinstance(call.dynamic.get(x), Product):
        call.dynamic[result] = call.dynamic[x]
    return result


def to_float8(x: Tensor, dtype: torch.dtype, *, saturate: bool) -> Tensor:
    """To an 8-bit float: what is too large becomes the largest number, or without ``saturate`` NaN or infinity.

    Any shape.
    """
    largest = float(torch.finfo(dtype).max)
    wide = x.to(torch.float32)
    clamped = torch.clamp(wide, -largest, largest)
    if saturate:
        return clamped.to(dtype)
    # Up to half a step above the largest number still rounds down to it.
    step = LAST_STEPS.get(dtype, 8192.0)
    beyond = torch.full((), float("inf") if dtype == torch.float8_e5m2 else float("nan"))
    signed = torch.mul(beyond, torch.sign(wide))
    return torch.where(torch.abs(wide) > largest + step / 2, signed, clamped).to(dtype)


def tagged(call: OpCall, value: Tensor, elem_type: int) -> Tensor:
    """``value``, remembered as 2 or 4-bit integers that torch keeps in whole bytes. Any shape."""
    if elem_type in SUB_BYTE_BITS:
        value = value.view_as(value)
        call.elem_types[value] = elem_type
    return value


def _to_few_bits(x: Tensor, elem_type: int) -> Tensor:
    """Truncated towards zero, then only the low bits kept. Any shape."""
    low, high = integer_range(elem_type)
    whole = torch.trunc(x).to(torch.int64) if x.is_floating_point() else x.to(torch.int64)
    dtype = torch.uint8 if low == 0 else torch.int8
    return torch.sub(torch.remainder(torch.sub(whole, low), high - low + 1), -low).to(dtype)


@op("BitCast")
def bit_cast(call: OpCall) -> Tensor:
    """The same bits read as another type of the same width. Any shape."""
    x, dtype = call.x(0), torch_dtype(call.attr_int("to"), call.where)
    if x.dtype.itemsize != dtype.itemsize or call.attr_int("to") in SUB_BYTE_BITS:
        raise call.refuse("it changes the width of an element")
    return x.view(dtype)


@op("HannWindow", "HammingWindow", "BlackmanWindow")
def window(call: OpCall) -> Tensor:
    """Hann, Hamming and Blackman windows as the specification defines them. [size]."""
    size = call.const_int(0, "size")
    call.check_size((size,))
    periodic = call.attr_int("periodic", 1)
    dtype = torch_dtype(call.attr_int("output_datatype", TensorProto.FLOAT), call.where)
    length = size if periodic else size - 1
    phase = torch.arange(size, dtype=torch.float64) * (2 * math.pi / max(length, 1))
    terms = {
        "HannWindow": (0.5, 0.5, 0.0),
        "HammingWindow": (25 / 46, 21 / 46, 0.0),
        "BlackmanWindow": (0.42, 0.5, 0.08),
    }[call.node.op_type]
    return (terms[0] - terms[1] * torch.cos(phase) + terms[2] * torch.cos(2 * phase)).to(dtype)


@op("MelWeightMatrix")
def mel_weight_matrix(call: OpCall) -> Tensor:
    """Triangles on the mel scale, as https://onnx.ai/onnx/operators/onnx__MelWeightMatrix.html has them.

    [frequencies, bands].
    """
    bins, length, rate = (call.const_int(index) for index in (0, 1, 2))
    low, high = (float(call.const(index).item()) for index in (3, 4))
    spectrum = length // 2 + 1
    call.check_size((spectrum, bins))
    dtype = torch_dtype(call.attr_int("output_datatype", TensorProto.FLOAT), call.where)
    low_mel, high_mel = (2595 * math.log10(1 + hertz / 700) for hertz in (low, high))
    step = (high_mel - low_mel) / (bins + 2)
    edges_hz = [700 * (10 ** ((low_mel + step * index) / 2595) - 1) for index in range(bins + 2)]
    edges = [int((length + 1) * hertz // rate) for hertz in edges_hz]
    matrix = torch.zeros(spectrum, bins, dtype=torch.float64)
    for index, (left, centre, right) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        if left == centre:
            matrix[centre, index] = 1.0
        for place in range(left, centre + 1 if left != centre else centre):
            matrix[place, index] = (place - left) / (centre - left)
        for place in range(centre, right):
            matrix[place, index] = (right - place) / (right - centre)
    return matrix.to(dtype)


@op("Dropout")
def dropout_inference(call: OpCall) -> tuple[Tensor, Tensor]:
    """Before opset 12 a file cannot ask for training, or (before 7) asks for it by leaving ``is_test`` out.

    The input, and a mask of its shape.
    """
    return call.x(0), torch.ones(call.x(0).shape, dtype=torch.bool)


@op("Dropout", since=12)
def dropout(call: OpCall) -> tuple[Tensor, Tensor]:
    """Identity; a file that drops out refuses to be imported. The input, and a mask of its shape."""
    training = call.optional(2)
    if training is not None:
        ratio = call.optional(1)
        dropped = ratio is None or not is_constant(ratio) or float(ratio.item()) > 0
        if not is_constant(training) or (bool(training.item()) and dropped):
            raise call.refuse("it is in training mode", fix="export the model in eval mode")
    return call.x(0), torch.ones(call.x(0).shape, dtype=torch.bool)
