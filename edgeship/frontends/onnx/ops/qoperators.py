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
from onnx import TensorProto

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.constants import Integers
from edgeship.frontends.onnx.ops.contrib import BLOCKED, unpacked
from edgeship.frontends.onnx.ops.linear import linear_weight
from edgeship.frontends.onnx.ops.pooling import average_pool
from edgeship.frontends.onnx.ops.quantization import (
    dequantize_linear,
    quantize_linear,
    restored,
    restored_input,
    rounded,
    scaled_bias,
)
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
    """Channels first, or last as the optimizer turns them."""
    x = restored(call, 0)
    last = bool(call.attr_int("channels_last", 0))
    if last:
        # [N, ..., C] -> [N, C, ...]
        x = torch.movedim(x, -1, 1)
    if call.node.op_type == "QLinearAveragePool":
        pooled = _tensor(average_pool(replace(call, inputs=(x,))))
    else:
        pooled = torch.mean(x, tuple(range(2, x.dim())), keepdim=True)
    return rounded(call, torch.movedim(pooled, 1, -1) if last else pooled, 3)


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


@op("QLinearWhere", domain=_MS)
def where(call: OpCall) -> Answer:
    """Of two tensors on grids of their own, by a condition."""
    return rounded(call, torch.where(call.x(0), restored(call, 1), restored(call, 4)), 7)


@op("DynamicQuantizeMatMul", domain=_MS)
def dynamic_matmul(call: OpCall) -> Tensor:
    """A product with an integer weight [K, N]; what it does to activations is left to the runtime. -> [..., M, N]."""
    call.note_dynamic()
    return _product(call, call.x(0), scale=2, zero=3, bias=4)


@op("MatMulIntegerToFloat", domain=_MS)
def integer_matmul_to_float(call: OpCall) -> Tensor:
    """A product of an integer activation and an integer weight [K, N], in float. -> [..., M, N]."""
    return _product(call, restored_input(call, 0, 2, 4), scale=3, zero=5, bias=6)


def _product(call: OpCall, x: Tensor, *, scale: int, zero: int, bias: int) -> Tensor:
    """[..., M, K] x [K, N] -> [..., M, N]; ``scale``, ``zero`` and ``bias`` are inputs."""
    matrix = restored(call, 1, axis=1, scale=scale, zero=zero)
    if not is_constant(matrix) or matrix.dim() != 2:
        product = torch.matmul(x, matrix)
        return torch.add(product, call.x(bias)) if call.given(bias) else product
    call.constants.mark_weight(matrix)
    return F.linear(x, linear_weight(call, matrix), call.optional_weight(bias))


@op("GatherBlockQuantized", domain=_MS)
def gather_blocks(call: OpCall) -> Tensor:
    """Rows of a table [rows, columns] of integers in blocks along each row; [...] -> [..., columns]."""
    table, indices, scales = call.const(0, "the table"), call.x(1), call.const(2, "the scales")
    block, bits = call.attr_int("block_size", 128), call.attr_int("bits", 4)
    along = call.axis(call.attr_int("quantize_axis", 1), table.dim())
    if table.dim() != 2 or along != 1 or call.axis(call.attr_int("gather_axis", 0), 2) != 0:
        raise call.refuse("only rows of a matrix in blocks along each row are imported")
    zero = call.optional(3)
    elem_type = call.elem_type(0)
    if elem_type == TensorProto.UINT8:
        # Packed: low bits first.
        elem_type, table = BLOCKED[bits], unpacked(table, bits)
        zero = torch.full((), 1 << (bits - 1), dtype=torch.uint8) if zero is None else unpacked(zero, bits)
    blocks = scales.shape[1]
    points = torch.zeros((), dtype=torch.int32) if zero is None else zero
    points = points[:, :blocks] if points.dim() else points.expand(scales.shape)
    wide = scales.to(torch.float32)
    spread = [torch.repeat_interleave(part, block, 1)[:, : table.shape[1]] for part in (wide, points)]
    value = torch.mul(torch.sub(table.to(torch.float32), spread[1].to(torch.float32)), spread[0])
    call.constants.name(value, call.constants.name_of(call.x(0)))
    if table.shape[1] % block == 0:
        call.constants.remember(value, Integers(wide, points, elem_type))
    call.constants.mark_weight(value)
    return F.embedding(indices.to(torch.int64), value)


def _tensor(value: Result) -> Tensor:
    """``value`` of any shape."""
    assert isinstance(value, Tensor), "these operators answer with one tensor"
    return value
