"""Operators of ONNX Runtime's own domain, as its optimizer and exporters leave them in files.

Specification: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from onnx import TensorProto

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.constants import Integers
from edgeship.frontends.onnx.ops.convolution import convolve
from edgeship.frontends.onnx.ops.linear import gemm_product, linear_weight
from edgeship.frontends.onnx.registry import Result, op
from edgeship.frontends.onnx.values import is_constant

Tensor = torch.Tensor

_MS = "com.microsoft"
#: Integers of a weight in blocks, by their bits.
BLOCKED = {2: TensorProto.UINT2, 4: TensorProto.UINT4, 8: TensorProto.UINT8}


@op("Gelu", domain=_MS)
def gelu(call: OpCall) -> Tensor:
    """Exact. Any shape."""
    return F.gelu(call.x(0))


@op("BiasGelu", domain=_MS)
def bias_gelu(call: OpCall) -> Tensor:
    """Gelu of `x + bias`. ``x`` [..., n], ``bias`` [n]."""
    return F.gelu(torch.add(call.x(0), call.weight(1)))


@op("FastGelu", domain=_MS)
def fast_gelu(call: OpCall) -> Tensor:
    """Gelu by tanh, of `x + bias`. ``x`` [..., n], ``bias`` [n]."""
    x = torch.add(call.x(0), call.weight(1)) if call.given(1) else call.x(0)
    return F.gelu(x, approximate="tanh")


@op("QuickGelu", domain=_MS)
def quick_gelu(call: OpCall) -> Tensor:
    """`x * sigmoid(alpha * x)`. Any shape."""
    x = call.x(0)
    return torch.mul(x, torch.sigmoid(torch.mul(x, call.attr_float("alpha", 1.702))))


@op("FusedConv", domain=_MS)
def fused_conv(call: OpCall) -> Tensor:
    """A convolution, a sum, an activation. As ``Conv``: [N, C, ...] -> [N, M, ...]."""
    result = convolve(call, call.x(0), call.weight(1), call.optional_weight(2))
    if call.given(3):
        result = torch.add(result, call.x(3))
    return _activated(call, result)


@op("FusedGemm", domain=_MS)
def fused_gemm(call: OpCall) -> Tensor:
    """Gemm and an activation. As ``Gemm``: [M, N]."""
    return _activated(call, gemm_product(call))


@op("FusedMatMul", "TransposeMatMul", domain=_MS)
def fused_matmul(call: OpCall) -> Tensor:
    """`alpha * A' @ B'`. [..., M, K] x [..., K, N] -> [..., M, N]."""
    a, b = call.x(0), call.x(1)
    if call.attr_int("transBatchA", 0) or call.attr_int("transBatchB", 0):
        raise call.refuse("transBatchA and transBatchB are not imported")
    if call.attr_int("transA", 0):
        a = torch.transpose(a, -1, -2)
    trans_b, alpha = bool(call.attr_int("transB", 0)), call.attr_float("alpha", 1.0)
    if is_constant(b) and b.dim() == 2:
        product = F.linear(a, call.weight(1) if trans_b else linear_weight(call, b))
    else:
        product = torch.matmul(a, torch.transpose(b, -1, -2) if trans_b else b)
    return product if alpha == 1.0 else torch.mul(product, alpha)


@op("SkipLayerNormalization", domain=_MS)
def skip_layer_norm(call: OpCall) -> Result:
    """Inputs: x, skip, gamma, beta, bias; output 3 is the sum before the norm."""
    total = torch.add(call.x(0), call.x(1))
    if call.given(4):
        total = torch.add(total, call.weight(4))
    epsilon = call.attr_float("epsilon", 1e-12)
    normal = F.layer_norm(total, (total.shape[-1],), call.weight(2), call.optional_weight(3), epsilon)
    return normal, None, None, total


@op("SimplifiedLayerNormalization", domain=_MS)
@op("SimplifiedLayerNormalization")
def simplified_layer_norm(call: OpCall) -> Tensor:
    """RMS norm over the last axis; also found in the standard domain."""
    x, scale = call.x(0), call.weight(1)
    if call.axis(call.attr_int("axis", -1), x.dim()) != x.dim() - 1:
        raise call.refuse("only the last axis is imported")
    return F.rms_norm(x, (x.shape[-1],), scale, call.attr_float("epsilon", 1e-5))


@op("SkipSimplifiedLayerNormalization", domain=_MS)
def skip_simplified_layer_norm(call: OpCall) -> Result:
    """Inputs: x, skip, gamma, bias; output 3 is the sum before the norm."""
    total = torch.add(call.x(0), call.x(1))
    if call.given(3):
        total = torch.add(total, call.weight(3))
    epsilon = call.attr_float("epsilon", 1e-5)
    return F.rms_norm(total, (total.shape[-1],), call.weight(2), epsilon), None, None, total


@op("MatMulNBits", domain=_MS)
def matmul_n_bits(call: OpCall) -> Tensor:
    """A weight [N, K] in blocks of 2, 4 or 8-bit integers, which stay what they are."""
    x, packed, scales = call.x(0), call.const(1, "the weight"), call.const(2, "the scales")
    rows, columns = call.attr_int("N"), call.attr_int("K")
    bits, block = call.attr_int("bits", 4), call.attr_int("block_size")
    if bits not in (2, 4, 8) or call.given(4) or block < 1:
        raise call.refuse(f"{bits} bits, or reordered groups, are not imported")
    blocks = -(-columns // block)
    values = unpacked(packed.reshape(rows, blocks, -1), bits)
    points = call.const(3, "the zero points") if call.given(3) else torch.full((), 1 << (bits - 1), dtype=torch.uint8)
    if points.dtype == torch.uint8 and points.dim():
        points = unpacked(points.reshape(rows, -1), bits)[:, :blocks]
    # One for each block: [rows, blocks]
    points = points.expand(rows, blocks) if not points.dim() else points.reshape(rows, blocks)
    wide = scales.reshape(rows, blocks).to(torch.float32)
    weight = (values.to(torch.float32) - points.unsqueeze(-1).to(torch.float32)) * wide.unsqueeze(-1)
    # [rows, blocks, block] -> [rows, columns]
    weight = weight.reshape(rows, -1)[:, :columns].to(x.dtype).contiguous()
    call.constants.inherit(weight, packed)
    if not points.is_floating_point() and columns % block == 0:
        call.constants.remember(weight, Integers(wide, points, BLOCKED[bits]))
    call.constants.mark_weight(weight)
    return F.linear(x, weight, call.optional_weight(5))


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Several integers a byte, low bits first: [..., bytes] -> [..., 8 / bits * bytes]."""
    if bits == 8:
        return packed
    most = (1 << bits) - 1
    return torch.stack([packed >> shift & most for shift in range(0, 8, bits)], -1).flatten(-2)


def _activated(call: OpCall, x: Tensor) -> Tensor:
    """The activation that ``call`` names, of any shape."""
    name = call.attr_text("activation", "")
    parameters = call.attr_floats("activation_params", ())
    if name == "LeakyRelu":
        return F.leaky_relu(x, parameters[0] if parameters else call.attr_float("leaky_relu_alpha", 0.01))
    if name == "Clip" and len(parameters) == 2:
        return torch.clamp(x, parameters[0], parameters[1])
    plain: dict[str, Callable[[Tensor], Tensor]] = {
        "": lambda t: t,
        "Relu": torch.relu,
        "Sigmoid": torch.sigmoid,
        "Tanh": torch.tanh,
    }
    if name not in plain:
        raise call.refuse(f"activation {name} is not imported")
    return plain[name](x)
