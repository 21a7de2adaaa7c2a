"""What TorchScript calls: functions on numbers, texts and lists from a table of ours, and torch's operators on tensors.

Nothing is looked up by a name of the file but operators that torch's dispatcher has: TorchScript adds others, which
read and write files.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from edgeship.compat.torch import operator_names
from edgeship.errors import LimitError, SourceError, UnsupportedOpError

_MAX_ITEMS = 1 << 20
_MAX_BITS = 63
# They open files, print, and draw numbers.
_NOT_CALLED = frozenset({"from_file", "_print", "save"})
_FIX = "export the model it was made from with torch.export.save, or name its factory"


def find_call(name: str) -> Callable[..., Any]:
    """The function for ``aten.add`` or ``prim.device``.

    Raises:
        UnsupportedOpError: there is none, or it is none of torch's tensor operators.
    """
    own = _TABLE.get(name)
    space, _, short = name.partition(".")
    tensors = _operator(short) if space == "aten" else None
    if own is None and tensors is None:
        raise UnsupportedOpError(f"the TorchScript operator {name[:80]} is not read", fix=_FIX)
    if tensors is None:
        assert own is not None
        return own

    def call(*args: Any, **kwargs: Any) -> Any:
        plain = not any(_holds_tensor(item) for item in (*args, *kwargs.values()))
        if own is not None and (plain or short in _ALWAYS):
            return own(*args, **kwargs)
        return tensors(*args, **kwargs)

    return call


@lru_cache(maxsize=4096)
def _operator(name: str) -> Callable[..., Any] | None:
    """An operator of the dispatcher, whichever of its forms fits; None where the dispatcher has none."""
    if name in _NOT_CALLED or not name.isidentifier() or not _in_dispatcher(name):
        return None
    found: Callable[..., Any] = getattr(torch.ops.aten, name)
    return found


@lru_cache(maxsize=1)
def _names() -> frozenset[str]:
    return frozenset(full.partition(".")[0] for full in operator_names())


def _in_dispatcher(name: str) -> bool:
    return f"aten::{name}" in _names()


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, torch.Tensor)


def _bounded(value: Any) -> Any:
    """A number or a list that a model can mean."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > _MAX_BITS:
        raise LimitError("the TorchScript file computes a number of more than 63 bits", fix=_FIX)
    if isinstance(value, (list, str)) and len(value) > _MAX_ITEMS:
        raise LimitError(f"the TorchScript file makes a list of more than {_MAX_ITEMS} items", fix=_FIX)
    return value


def _product(a: Any, b: Any) -> Any:
    many = next((item for item in (a, b) if isinstance(item, (list, str))), None)
    if many is not None:
        count = b if many is a else a
        _bounded([None] * min(max(len(many) * int(count), 0), _MAX_ITEMS + 1))
    return _bounded(a * b)


def _power(a: Any, b: Any) -> Any:
    """Numbers to the power of numbers: a float of integers too, and infinite where it is too large."""
    if isinstance(a, int) and isinstance(b, int) and b >= 0 and a.bit_length() * b > 2 * _MAX_BITS:
        raise LimitError("the TorchScript file computes a number of more than 63 bits", fix=_FIX)
    if isinstance(a, complex) or isinstance(b, complex):
        return a**b
    with np.errstate(all="ignore"):
        return float(np.float64(a) ** np.float64(b))


def _shifted(a: int, b: int) -> Any:
    return _bounded(a << min(b, _MAX_BITS + 1))


def _sort(values: list[Any], reverse: bool = False) -> None:
    values.sort(reverse=reverse)


def _rounded(value: Any) -> float:
    """TorchScript's ``round`` makes a float, to the even neighbour from the middle."""
    return float(round(value))


def _sized(value: Any, dim: int | None = None) -> Any:
    """The shape of a tensor as a list, or one size of it."""
    return list(value.shape) if dim is None else value.shape[dim]


def _sliced(value: Any, *bounds: Any) -> Any:
    """A part of a tensor along an axis (0 by default), its other axes as they are; of a list its bounds alone."""
    if isinstance(value, torch.Tensor):
        dim, start, end, step = _with_defaults(bounds, (0, None, None, 1))
        last = 2**63 - 1 if end is None else end
        return torch.ops.aten.slice.Tensor(value, dim, 0 if start is None else start, last, step)
    first, stop, stride = _with_defaults(bounds, (None, None, 1))
    return value[first:stop:stride]


def _with_defaults(given: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    return given + defaults[len(given) :]


def _convolution(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, *rest: Any) -> torch.Tensor:
    """A convolution as traces write it, with switches of cuDNN behind. [N, C, ...] -> [N, M, ...]."""
    transposed, out_padding, groups = rest[:3]
    arguments = (x, weight, bias, stride, padding, dilation, transposed, out_padding, groups)
    found: torch.Tensor = torch.ops.aten.convolution(*arguments)
    return found


def _raised(message: Any = "", *rest: Any) -> Any:
    raise SourceError(f"the TorchScript model refuses its inputs: {str(message)[:200]}", fix="give other sizes")


def _formatted(text: str, *items: Any) -> str:
    for item in items:
        text = text.replace("{}", str(item)[:200], 1)
    return str(_bounded(text))


def _appended(values: list[Any], item: Any) -> list[Any]:
    values.append(item)
    return values


def _set(values: Any, place: Any, item: Any) -> Any:
    values[place] = item
    return values


def _range_length(low: int, high: int, step: int) -> int:
    return len(range(low, high, step))


def _number(value: Any) -> Any:
    """A tensor of one element as a number. Raises torch's error where the numbers are not known yet."""
    return value.item() if isinstance(value, torch.Tensor) else value


def _cast(value: Any, kind: Any, *rest: Any) -> Any:
    """``to`` of a number that a trace counts as a tensor: whole or not, by torch's number for the dtype."""
    return int(value) if kind in (0, 1, 2, 3, 4) else float(value)


def _tensor(value: Any, dtype: Any = None, *rest: Any, **named: Any) -> torch.Tensor:
    """A tensor of numbers, in the shape of their lists."""
    return torch.tensor(value, dtype=_dtype(dtype))


def _scalar_tensor(value: Any, dtype: Any = None, **named: Any) -> torch.Tensor:
    """A number as a tensor without axes, float32 where nothing else is said. []."""
    return _tensor(value, torch.float32 if dtype is None else dtype)


def _as_tensor(value: Any, dtype: Any = None, *rest: Any, **named: Any) -> torch.Tensor:
    """A tensor, or numbers as one. In its own shape."""
    if not isinstance(value, torch.Tensor):
        return _tensor(value, dtype)
    return value if dtype is None else value.to(_dtype(dtype))


def _dtype(dtype: Any) -> Any:
    """A dtype by torch's number for it, or as it is."""
    return _DTYPES[dtype] if isinstance(dtype, int) else dtype


def _first(value: Any, *rest: Any) -> Any:
    return value


def _nothing(*rest: Any) -> None:
    return None


def _compared(function: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda a, b: bool(function(a, b))


#: torch's numbers for dtypes, as TorchScript writes them.
_DTYPES: Mapping[int, torch.dtype] = {
    0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64, 5: torch.float16, 6: torch.float32,
    7: torch.float64, 9: torch.complex64, 10: torch.complex128, 11: torch.bool, 15: torch.bfloat16,
}  # fmt: skip
_UNARY: Mapping[str, Callable[..., Any]] = {
    "ceil": math.ceil, "floor": math.floor, "sqrt": math.sqrt, "log": math.log, "exp": math.exp, "sin": math.sin,
    "cos": math.cos, "tan": math.tan, "tanh": math.tanh, "log2": math.log2, "log10": math.log10, "round": _rounded,
    "abs": abs, "neg": operator.neg, "isnan": math.isnan, "isfinite": math.isfinite, "isinf": math.isinf,
}  # fmt: skip
_BINARY: Mapping[str, Callable[[Any, Any], Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": _product, "div": operator.truediv, "floordiv": operator.floordiv,
    "floor_divide": operator.floordiv, "remainder": operator.mod, "fmod": math.fmod, "pow": _power,
    "eq": _compared(operator.eq), "ne": _compared(operator.ne), "lt": _compared(operator.lt),
    "le": _compared(operator.le), "gt": _compared(operator.gt), "ge": _compared(operator.ge),
    "__and__": operator.and_, "__or__": operator.or_, "__xor__": operator.xor, "__lshift__": _shifted,
    "__rshift__": operator.rshift,
}  # fmt: skip
#: Answered here for tensors too: what they ask of a tensor is its form.
_ALWAYS = frozenset({
    "size", "dim", "len", "slice", "numel", "__is__", "__isnot__", "_convolution", "append", "list", "cpu", "cuda",
    "is_floating_point", "device", "_set_item", "insert", "extend", "set_grad_enabled", "is_grad_enabled", "warn",
    "item", "tensor", "as_tensor", "Int", "Float", "Bool", "IntImplicit", "FloatImplicit", "ScalarImplicit",
    "__getitem__",
})  # fmt: skip
_ATEN: Mapping[str, Callable[..., Any]] = {
    **_UNARY,
    **{name: lambda a, b, *_, call=function: _bounded(call(a, b)) for name, function in _BINARY.items()},
    "size": _sized, "dim": lambda x: x.dim(), "numel": lambda x: x.numel(), "len": len, "slice": _sliced,
    "_convolution": _convolution, "append": _appended, "list": list, "__not__": operator.not_,
    "__is__": lambda a, b: a is b, "__isnot__": lambda a, b: a is not b,
    "__contains__": lambda values, item: item in values, "__getitem__": operator.getitem, "_set_item": _set,
    "__range_length": _range_length, "__derive_index": lambda index, low, step: low + index * step,
    "is_floating_point": lambda x: x.is_floating_point(), "cpu": _first, "cuda": _first, "format": _formatted,
    "item": _number, "Int": lambda x: int(_number(x)), "Float": lambda x: float(_number(x)),
    "Bool": lambda x: bool(_number(x)), "IntImplicit": lambda x: int(_number(x)),
    "FloatImplicit": lambda x: float(_number(x)), "ScalarImplicit": _number, "str": str, "warn": _nothing,
    "set_grad_enabled": _nothing, "is_grad_enabled": lambda: False,
    "keys": lambda x: list(x.keys()), "values": lambda x: list(x.values()), "items": lambda x: list(x.items()),
    "get": lambda x, key, other=None: x.get(key, other), "dict": dict, "device": lambda *_: torch.device("cpu"),
    "insert": lambda x, place, item: x.insert(place, item), "extend": lambda x, more: _bounded(x.extend(more) or x),
    "pop": lambda x, *place: x.pop(*place), "reverse": lambda x: x.reverse(), "copy": lambda x: x.copy(),
    "sorted": sorted, "sort": _sort, "to": _cast, "join": lambda text, parts: text.join(parts),
    "tensor": _tensor, "as_tensor": _as_tensor, "is_autocast_enabled": lambda *_: False,
    "is_autocast_cpu_enabled": lambda: False, "is_scripting": lambda: True, "is_tracing": lambda: False,
    "scalar_tensor": _scalar_tensor, "split": lambda text, *at: text.split(*at),
}  # fmt: skip
_PRIM: Mapping[str, Callable[..., Any]] = {
    "NumToTensor": _first, "device": lambda x: torch.device("cpu"), "dtype": lambda x: x.dtype,
    "data": lambda x: x.detach(), "layout": lambda x: torch.strided, "is_cuda": lambda x: False,
    "RaiseException": _raised, "unchecked_unwrap_optional": _first, "unchecked_cast": lambda kind, x: x,
    "requires_grad": lambda x: False, "is_quantized": lambda x: False, "shape": _sized, "min": min, "max": max,
    "abs": abs, "is_cpu": lambda x: True, "is_nested": lambda x: False, "grad": _nothing, "ndim": lambda x: x.dim(),
    "is_mkldnn": lambda x: False, "is_sparse": lambda x: False, "is_meta": lambda x: False, "is_xpu": lambda x: False,
    "rangelist": lambda count: _bounded(list(range(min(count, _MAX_ITEMS + 1)))), "Print": _nothing,
    "name": lambda x: "", "type": lambda x: "cpu", "itemsize": lambda x: x.itemsize,
}  # fmt: skip
_TABLE = {
    **{f"aten.{name}": function for name, function in _ATEN.items()},
    **{f"prim.{name}": function for name, function in _PRIM.items()},
}
