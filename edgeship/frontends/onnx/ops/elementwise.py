"""Arithmetic, comparison, logic and bit operators, element by element."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.dtypes import SPARSELY_SUPPORTED
from edgeship.frontends.onnx.registry import op
from edgeship.frontends.onnx.values import Product, Scaled, is_constant

Tensor = torch.Tensor
Binary = Callable[[Tensor, Tensor], Tensor]


def widened(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Run ``function`` in int64 where torch lacks kernels for the dtype of ``tensors``, and come back. Any shapes."""
    dtype = tensors[0].dtype
    if dtype not in SPARSELY_SUPPORTED:
        return function(*tensors)
    result = function(*(tensor.to(torch.int64) for tensor in tensors))
    return result if result.dtype == torch.bool else result.to(dtype)


def operands(call: OpCall) -> tuple[Tensor, Tensor]:
    """Both inputs, with a constant single number turned into a literal and opset-6 broadcasting applied.

    Shapes that broadcast.
    """
    left, right = call.x(0), call.x(1)
    if call.opset < 7 and call.attr_int("broadcast", 0):
        axis = call.attr_int("axis", left.dim() - right.dim())
        axis = axis + left.dim() if axis < 0 else axis
        if axis + right.dim() > left.dim():
            raise call.broken(f"axis {axis} with shapes {list(left.shape)} and {list(right.shape)}")
        right = right.reshape(tuple(right.shape) + (1,) * (left.dim() - axis - right.dim()))
    return _literal(left, right), _literal(right, left)


def _literal(value: Tensor, other: Tensor) -> Tensor:
    """A 0-d constant beside a graph value: recorded as a plain number it becomes no buffer. ``other`` has any shape."""
    single = is_constant(value) and not is_constant(other) and value.numel() == 1 and value.dim() <= other.dim()
    plain = value.dtype in (torch.float32, torch.int64, torch.int32) and other.dtype == value.dtype
    return value.item() if single and plain else value  # type: ignore[return-value]


def _binary(name: str, function: Binary, since: int = 1) -> None:
    @op(name, since=since)
    def run(call: OpCall) -> Tensor:
        """Element by element; shapes broadcast."""
        left, right = operands(call)
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return function(left, right)
        return widened(function, left, right)


def _unary(name: str, function: Callable[[Tensor], Tensor]) -> None:
    """Import ``name`` as a function of one tensor, element by element."""

    @op(name)
    def run(call: OpCall) -> Tensor:
        """Element by element."""
        return widened(function, call.x(0))


def _divide(left: Tensor, right: Tensor) -> Tensor:
    """Shapes that broadcast; integers are truncated."""
    whole = not (left if isinstance(left, Tensor) else right).is_floating_point()
    return torch.div(left, right, rounding_mode="trunc") if whole else torch.div(left, right)


_binary("Add", torch.add)
_binary("Sub", lambda a, b: torch.sub(a, b) if isinstance(a, Tensor) else torch.rsub(b, a))
_binary("Div", _divide)
_binary("And", torch.logical_and)
_binary("Or", torch.logical_or)
_binary("Xor", torch.logical_xor)
_binary("BitwiseAnd", torch.bitwise_and)
_binary("BitwiseOr", torch.bitwise_or)
_binary("BitwiseXor", torch.bitwise_xor)
_binary("Equal", lambda a, b: torch.eq(a, b) if isinstance(a, Tensor) else torch.eq(b, a))
_binary("Greater", lambda a, b: torch.gt(a, b) if isinstance(a, Tensor) else torch.lt(b, a))
_binary("GreaterOrEqual", lambda a, b: torch.ge(a, b) if isinstance(a, Tensor) else torch.le(b, a))
_binary("Less", lambda a, b: torch.lt(a, b) if isinstance(a, Tensor) else torch.gt(b, a))
_binary("LessOrEqual", lambda a, b: torch.le(a, b) if isinstance(a, Tensor) else torch.ge(b, a))

_unary("Abs", torch.abs)
_unary("Neg", torch.neg)
_unary("Sign", torch.sign)
_unary("Sqrt", torch.sqrt)
_unary("Exp", torch.exp)
_unary("Log", torch.log)
_unary("Erf", torch.erf)
_unary("Floor", torch.floor)
_unary("Ceil", torch.ceil)
_unary("Round", torch.round)
_unary("Reciprocal", torch.reciprocal)
_unary("Not", torch.logical_not)
_unary("BitwiseNot", torch.bitwise_not)
_unary("IsNaN", torch.isnan)
_unary("Sin", torch.sin)
_unary("Cos", torch.cos)
_unary("Tan", torch.tan)
_unary("Asin", torch.asin)
_unary("Acos", torch.acos)
_unary("Atan", torch.atan)
_unary("Sinh", torch.sinh)
_unary("Cosh", torch.cosh)
_unary("Asinh", torch.asinh)
_unary("Acosh", torch.acosh)
_unary("Atanh", torch.atanh)
_unary("Det", torch.linalg.det)


@op("Mul")
def multiply(call: OpCall) -> Tensor:
    """Element by element; where it scales a sum of integers back, the float product that was meant."""
    left, right = operands(call)
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return _followed(call, torch.mul(left, right))
    known = [None if is_constant(side) else call.dynamic.get(side) for side in (left, right)]
    for product, scaled in (known, known[::-1]):
        if isinstance(product, Product) and isinstance(scaled, Scaled) and product.scale is scaled.scale:
            return product.make(scaled.factor)
    return _followed(call, widened(torch.mul, left, right))


def _followed(call: OpCall, result: Tensor) -> Tensor:
    """``result``, remembered where it is a scale that the data decide times a constant. Any shape."""
    for index in (0, 1):
        scaled = None if is_constant(call.inputs[index]) else call.dynamic.get(call.x(index))
        if isinstance(scaled, Scaled) and is_constant(call.inputs[1 - index]):
            call.dynamic[result] = Scaled(scaled.scale, torch.mul(scaled.factor, call.x(1 - index)))
    return result


@op("Pow")
def power(call: OpCall) -> Tensor:
    """The result has the type of the base. Shapes broadcast."""
    base, exponent = call.x(0), call.x(1)
    if call.opset < 7:
        base, exponent = operands(call)
        return torch.pow(base, exponent)
    dtype = base.dtype
    if is_constant(exponent) and not is_constant(base) and exponent.numel() == 1 and exponent.dim() <= base.dim():
        number = exponent.item()
        # 2.0 and 2 are the same exponent, and an int keeps int powers exact.
        literal = int(number) if float(number).is_integer() and abs(number) < 1 << 31 else number
        return widened(lambda x: torch.pow(x, literal), base).to(dtype)
    if base.dtype in SPARSELY_SUPPORTED:
        base = base.to(torch.int64)
    if exponent.dtype in SPARSELY_SUPPORTED:
        exponent = exponent.to(torch.int64)
    return torch.pow(base, exponent).to(dtype)


@op("Mod")
def modulo(call: OpCall) -> Tensor:
    """The sign follows the divisor, or with ``fmod`` the dividend. Shapes broadcast."""
    function = torch.fmod if call.attr_int("fmod", 0) else torch.remainder
    return widened(function, call.x(0), call.x(1))


@op("BitShift")
def bit_shift(call: OpCall) -> Tensor:
    """An amount outside of 0..bits-1 leaves only copies of the sign bit, or zeros. Shapes broadcast."""
    left = call.attr_text("direction") == "LEFT"
    x, amount = call.x(0), call.x(1).to(torch.int64)
    bits = 8 * x.dtype.itemsize
    # int64 carries the bits of every type; only a uint64 would drag a sign along to the right.
    wide, places = x.to(torch.int64), torch.clamp(amount, 0, bits - 1)
    if left:
        shifted, fill = torch.bitwise_left_shift(wide, places), torch.zeros_like(wide)
    else:
        shifted, fill = torch.bitwise_right_shift(wide, places), torch.bitwise_right_shift(wide, 63)
        if x.dtype == torch.uint64:
            keep = torch.bitwise_not(torch.bitwise_left_shift(torch.bitwise_left_shift(fill, 63 - places), 1))
            shifted, fill = torch.bitwise_and(shifted, keep), torch.zeros_like(wide)
    inside = torch.logical_and(torch.ge(amount, 0), torch.lt(amount, bits))
    return torch.where(inside, shifted, fill).to(x.dtype)


@op("Max")
def maximum(call: OpCall) -> Tensor:
    """Of any number of tensors. Shapes broadcast."""
    return reduce(lambda a, b: widened(torch.maximum, a, b), call.tensors())


@op("Min")
def minimum(call: OpCall) -> Tensor:
    """Of any number of tensors. Shapes broadcast."""
    return reduce(lambda a, b: widened(torch.minimum, a, b), call.tensors())


@op("Sum")
def total(call: OpCall) -> Tensor:
    """Of any number of tensors. Shapes broadcast."""
    return reduce(torch.add, call.tensors())


@op("Mean")
def average(call: OpCall) -> Tensor:
    """Of any number of tensors. Shapes broadcast."""
    return torch.div(reduce(torch.add, call.tensors()), len(call.inputs))


@op("IsInf")
def is_infinite(call: OpCall) -> Tensor:
    """Either sign, or one of them. Booleans of the input's shape."""
    x = call.x(0)
    positive, negative = call.attr_int("detect_positive", 1), call.attr_int("detect_negative", 1)
    if x.dtype.itemsize == 1:
        x = x.to(torch.float32)
    if positive and negative:
        return torch.isinf(x)
    if positive:
        return torch.isposinf(x)
    return torch.isneginf(x) if negative else torch.zeros_like(x, dtype=torch.bool)


@op("Where")
def where(call: OpCall) -> Tensor:
    """`x` where the condition holds, else `y`. Shapes broadcast."""
    return torch.where(call.x(0), call.x(1), call.x(2))


@op("Clip")
def clip_attributes(call: OpCall) -> Tensor:
    """Before opset 11 the bounds are attributes. Any shape."""
    low = call.attr_float("min", torch.finfo(torch.float32).min)
    high = call.attr_float("max", torch.finfo(torch.float32).max)
    return torch.clamp(call.x(0), low if call.has("min") else None, high if call.has("max") else None)


@op("Clip", since=11)
def clip(call: OpCall) -> Tensor:
    """Constant bounds become literals. Any shape."""
    x, low, high = call.x(0), call.optional(1), call.optional(2)
    if low is None and high is None:
        return x
    if all(is_constant(bound) for bound in (low, high)) and x.dtype not in SPARSELY_SUPPORTED:
        numbers = [None if bound is None else bound.item() for bound in (low, high)]
        return torch.clamp(x, numbers[0], numbers[1])
    if low is not None:
        x = widened(torch.maximum, x, low)
    return x if high is None else widened(torch.minimum, x, high)
