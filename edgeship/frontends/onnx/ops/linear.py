"""Matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.constants import Integers
from edgeship.frontends.onnx.registry import Result, op
from edgeship.frontends.onnx.values import Product, Rounded, is_constant

Tensor = torch.Tensor


@op("Gemm")
def gemm(call: OpCall) -> Result:
    """With a constant B it is a linear layer whose weight has shape [N, K]."""
    return gemm_product(call)


def gemm_product(call: OpCall) -> Tensor:
    """``alpha * A' @ B' + beta * C``. [M, K] x [K, N] + [M, N] or less -> [M, N]."""
    a, b, c = call.x(0), call.weight(1), call.optional_weight(2)
    alpha, beta = call.attr_float("alpha", 1.0), call.attr_float("beta", 1.0)
    if call.attr_int("transA", 0):
        a = torch.transpose(a, 0, 1)
    transposed = bool(call.attr_int("transB", 0))
    if beta == 0.0:
        c = None
    if not is_constant(b) or not a.is_floating_point():
        product = torch.matmul(a, torch.transpose(b, 0, 1) if transposed else b)
        return _plus(_times(product, alpha), c, beta)
    weight = b if transposed else linear_weight(call, b)
    if alpha != 1.0:
        weight = call.constants.derive(weight, f"times {alpha}", lambda t: torch.mul(t, alpha))
    if c is None:
        return F.linear(a, weight)
    if is_constant(c) and c.numel() == weight.shape[0] == c.shape[-1:].numel():
        bias = call.constants.derive(c, f"flat times {beta}", lambda t: _times(t, beta).reshape(-1))
        return F.linear(a, weight, bias)
    return _plus(F.linear(a, weight), c, beta)


@op("MatMul")
def matmul(call: OpCall) -> Tensor:
    """With a constant matrix on the right it is a linear layer whose weight has shape [N, K]."""
    a, b = call.x(0), call.x(1)
    if is_constant(b) and not is_constant(a) and b.dim() == 2 and a.is_floating_point():
        if a.shape[-1] != b.shape[0]:
            raise call.broken(f"its inputs have the shapes {list(a.shape)} and {list(b.shape)}")
        return F.linear(a, linear_weight(call, b))
    return torch.matmul(a, b)


def linear_weight(call: OpCall, matrix: Tensor) -> Tensor:
    """The transpose [N, K] of a constant [K, N], one and the same for every node that uses it."""
    return call.constants.derive(matrix, "transposed", lambda t: t.t().contiguous())


@op("Einsum")
def einsum(call: OpCall) -> Tensor:
    """In the notation that torch reads as well. Shapes as the equation says."""
    return torch.einsum(call.attr_text("equation").replace(" ", ""), *call.tensors())


@op("MatMulInteger")
def matmul_integer(call: OpCall) -> Tensor:
    """Products of centred 8-bit integers, summed in int32. [..., M, K] x [K, N] -> [..., M, N]."""
    a, b = call.x(0).to(torch.int32), call.x(1).to(torch.int32)
    if call.given(2):
        a_zero = call.x(2).to(torch.int32)
        a = torch.sub(a, a_zero.reshape(-1, 1) if a_zero.dim() == 1 and a_zero.numel() > 1 else a_zero)
    if call.given(3):
        b = torch.sub(b, call.x(3).to(torch.int32))
    result = torch.matmul(a, b)
    source = call.dynamic.get(call.x(0)) if not is_constant(call.inputs[0]) else None
    if isinstance(source, Rounded) and is_constant(b) and b.dim() == 2:

        def make(factor: Tensor) -> Tensor:
            """[..., M, K] -> [..., M, N] with float weights, once the scale behind the product is known."""
            return F.linear(source.value, linear_weight(call, integer_weight(call, b, factor)))

        call.dynamic[result] = Product(source.scale, make)
    return result


def integer_weight(call: OpCall, centred: Tensor, factor: Tensor) -> Tensor:
    """The float weight of an integer product: input 1 less its zero point, times the scale found behind the product.

    ``centred`` and the result: [K, N], or [M, C / groups, ...kernel]; ``factor`` one number, or one a channel.
    """
    call.note_dynamic()
    value = torch.mul(centred.to(torch.float32), factor)
    zero = call.x(3) if call.given(3) else torch.zeros((), dtype=torch.int32)
    call.constants.name(value, call.constants.name_of(call.x(1)))
    call.constants.remember(value, Integers(factor.reshape(-1), zero.reshape(-1), call.elem_type(1)))
    call.constants.mark_weight(value)
    return value


def _times(x: Tensor, factor: float) -> Tensor:
    """Any shape."""
    if factor == 1.0:
        return x
    return torch.mul(x, factor if x.is_floating_point() else int(factor))


def _plus(x: Tensor, c: Tensor | None, beta: float) -> Tensor:
    """Shapes broadcast."""
    return x if c is None else torch.add(x, _times(c, beta))
