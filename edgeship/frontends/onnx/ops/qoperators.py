"""Operators that take and give integers with their scales (QLinearConv and its kin), as float ones between grids.

The standard ones live in `edgeship.frontends.onnx.ops.quantization` for integers that no constant grid describes; here
are those of ONNX Runtime's domain, as its quantizer writes them.
Specification: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.constants import Integers
from edgeship.frontends.onnx.ops.pooling import average_pool
from edgeship.frontends.onnx.ops.quantization import dequantize_linear, quantize_linear, restored, rounded, scaled_bias
from edgeship.frontends.onnx.ops.recurrent import lstm
from edgeship.frontends.onnx.registry import Result, op
from edgeship.frontends.onnx.values import Quantized, is_constant

Tensor = torch.Tensor
Answer = Tensor | Quantized

_MS = "com.microsoft"


@op("QuantizeLinear", domain=_MS)
def quantize(call: OpCall) -> Result:
    """As the standard one; this domain had 16 and 4 bits first."""
    return quantize_linear(call)


@op("DequantizeLinear", domain=_MS)
def dequantize(call: OpCall) -> Result:
    """As the standard one."""
    return dequantize_linear(call)


@op("QLinearAdd", "QLinearMul", domain=_MS)
def binary(call: OpCall) -> Answer:
    """Of two tensors on grids of their own."""
    function = torch.add if call.node.op_type == "QLinearAdd" else torch.mul
    return rounded(call, function(restored(call, 0), restored(call, 3)), 6)


def _unary(name: str, function: Callable[[OpCall, Tensor], Tensor]) -> None:
    """Import ``name`` as a float function between two grids, element by element."""

    @op(name, domain=_MS)
    def run(call: OpCall) -> Answer:
        return rounded(call, function(call, restored(call, 0)), 3)


_unary("QLinearSigmoid", lambda _, x: torch.sigmoid(x))
_unary("QLinearLeakyRelu", lambda call, x: F.leaky_relu(x, call.attr_float("alpha", 0.01)))


@op("QLinearSoftmax", domain=_MS)
def quantized_softmax(call: OpCall) -> Answer:
    """By the rules of the standard opset that attribute ``opset`` names."""
    x = restored(call, 0)
    axis = call.axis(call.attr_int("axis", -1), x.dim())
    if call.attr_int("opset", 13) >= 13:
        return rounded(call, torch.softmax(x, axis), 3)
    flat = torch.reshape(x, (math.prod(x.shape[:axis]), -1))
    return rounded(call, torch.reshape(torch.softmax(flat, 1), tuple(x.shape)), 3)


@op("QLinearAveragePool", "QLinearGlobalAveragePool", domain=_MS)
def pool(call: OpCall) -> Answer:
    """Channels first."""
    if call.attr_int("channels_last", 0):
        raise call.refuse("channels_last is not imported", fix="quantize without the NHWC transformation")
    x = restored(call, 0)
    if call.node.op_type == "QLinearAveragePool":
        return rounded(call, _tensor(average_pool(replace(call, inputs=(x,)))), 3)
    return rounded(call, torch.mean(x, tuple(range(2, x.dim())), keepdim=True), 3)


@op("QLinearConcat", domain=_MS)
def concat(call: OpCall) -> Answer:
    """Output scale and zero point come first, then three inputs for each part."""
    parts = [restored(call, index) for index in range(2, len(call.inputs), 3)]
    return rounded(call, torch.cat(parts, call.axis(call.attr_int("axis"), parts[0].dim())), 0)


@op("QGemm", domain=_MS)
def gemm(call: OpCall) -> Answer:
    """``alpha * A' @ B' + C``, in float where no output scale is given."""
    a = restored(call, 0)
    if call.attr_int("transA", 0):
        a = torch.transpose(a, 0, 1)
    turned = bool(call.attr_int("transB", 0))
    matrix = restored(call, 3, axis=0 if turned else 1)
    if is_constant(matrix):
        call.constants.mark_weight(matrix)
    weight = matrix if turned else call.constants.derive(matrix, "transposed", lambda t: t.t().contiguous())
    alpha = call.attr_float("alpha", 1.0)
    # [M, K] x [N, K] -> [M, N]
    result = F.linear(a, weight)
    if alpha != 1.0:
        result = torch.mul(result, alpha)
    if call.given(6):
        bias = scaled_bias(call, 6, 1, 4)
        flat = alpha == 1.0 and is_constant(bias) and bias.numel() == weight.shape[0]
        result = F.linear(a, weight, bias.reshape(-1)) if flat else torch.add(result, bias)
    return rounded(call, result, 7) if call.given(7) else result


@op("DynamicQuantizeLSTM", domain=_MS)
def dynamic_lstm(call: OpCall) -> Result:
    """An LSTM with integer weights [directions, in, 4 * hidden]; what it does to activations is left to the runtime."""
    weights = []
    for place, scales in ((1, 8), (2, 10)):
        integers, scale, zero = call.const(place), call.const(scales), call.const(scales + 1)
        spread = [part.reshape(part.shape[0], 1, -1) for part in (scale.to(torch.float32), zero)]
        value = torch.mul(torch.sub(integers.to(torch.float32), spread[1].to(torch.float32)), spread[0])
        turned = value.transpose(1, 2).contiguous()
        call.constants.name(turned, call.constants.name_of(call.x(place)))
        by_row, zeros = (part.transpose(1, 2).contiguous() for part in spread)
        call.constants.remember(turned, Integers(by_row, zeros, call.elem_type(place)))
        weights.append(turned)
    call.note_dynamic()
    x, _, _, *others = call.inputs[:8]
    return lstm(replace(call, inputs=(x, *weights, *others)))


def _tensor(value: Result) -> Tensor:
    """``value`` of any shape."""
    assert isinstance(value, Tensor), "these operators answer with one tensor"
    return value
