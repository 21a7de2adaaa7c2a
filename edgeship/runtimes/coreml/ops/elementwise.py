"""Element by element: arithmetic, comparison, logic, and functions of one number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgeship.runtimes.coreml.ops.registry import Call, computable, op

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs


def _divide(x: Tensor, y: Tensor) -> Tensor:
    """Element by element; integers are truncated."""
    if x.dtype.is_floating_point or y.dtype.is_floating_point:
        return x / y
    return torch.div(x, y, rounding_mode="trunc")


def _power(x: Tensor, y: Tensor) -> Tensor:
    """Element by element; integers through float64."""
    if x.dtype.is_floating_point or y.dtype.is_floating_point:
        return torch.pow(x, y)
    return torch.pow(x.to(torch.float64), y.to(torch.float64)).to(torch.int64)


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "real_div": _divide,
    "floor_div": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "mod": torch.remainder,
    "pow": _power,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
}

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "logical_not": torch.logical_not,
    "round": torch.round,
    "sign": torch.sign,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}

#: Default epsilon, and the function of ``x + epsilon``.
_WITH_EPSILON: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "inverse": (1e-4, torch.reciprocal),
    "log": (1e-45, torch.log),
    "rsqrt": (1e-12, torch.rsqrt),
}


def _binary(name: str) -> None:
    function = _BINARY[name]

    @op(name)
    def apply(call: Call) -> Outputs:
        x, y = call.numbers("x"), call.numbers("y")
        if x.dtype != y.dtype:
            common = torch.promote_types(x.dtype, y.dtype)
            x, y = x.to(common), y.to(common)
        return function(x, y)


def _unary(name: str) -> None:
    function = _UNARY[name]

    @op(name)
    def apply(call: Call) -> Outputs:
        return function(call.numbers("x"))


def _with_epsilon(name: str) -> None:
    default, function = _WITH_EPSILON[name]

    @op(name)
    def apply(call: Call) -> Outputs:
        x = call.tensor("x")
        # The default is rounded to the type of x: in float16 log(0) is -inf, in float32 it is -103.
        epsilon = call.floats("epsilon") if call.has("epsilon") else torch.tensor(default, dtype=x.dtype).float()
        return function(computable(x) + epsilon)


for _name in _BINARY:
    _binary(_name)
for _name in _UNARY:
    _unary(_name)
for _name in _WITH_EPSILON:
    _with_epsilon(_name)


@op("clip")
def clip(call: Call) -> Outputs:
    """``min(max(x, alpha), beta)``."""
    return torch.minimum(torch.maximum(call.floats("x"), call.floats("alpha")), call.floats("beta"))


@op("threshold")
def threshold(call: Call) -> Outputs:
    """``max(x, alpha)``."""
    x = call.numbers("x")
    return torch.maximum(x, call.numbers("alpha").to(x.dtype))


@op("cast")
def cast(call: Call) -> Outputs:
    """The declared type of the output says to what: floats are cut towards zero, anything but 0 is True."""
    x = call.tensor("x")
    if call.outputs[0].type.dtype == "bool":
        return computable(x) != 0
    # float16 overflows to int64 garbage in a direct cast of inf; clamp as the hardware conversions do.
    if x.dtype.is_floating_point and not call.outputs[0].type.dtype.startswith("float"):
        return torch.nan_to_num(x.double(), nan=0.0, posinf=2.0**31 - 1, neginf=-(2.0**31)).to(torch.int64)
    return x


@op("select")
def select(call: Call) -> Outputs:
    """``a`` where ``cond`` is true, else ``b``; the three broadcast."""
    a, b = call.tensor("a"), call.tensor("b")
    return torch.where(call.tensor("cond").to(torch.bool), computable(a), computable(b))


@op("identity")
def identity(call: Call) -> Outputs:
    """The value itself, under another name."""
    return call.value("x")
