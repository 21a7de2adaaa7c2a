"""What a pickle can hold here: plain records, and the table of calls that are answered instead of made.

To read one more plain class, add a function to `CALLS`; it is given the arguments as plain data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MAX_DIMENSIONS = 64
# Numbers that a pickle may hold itself, in bytes: numpy scalars and small arrays of a trainer's.
MAX_INLINE_BYTES = 32 << 20
_DTYPES = r"[<>|=]?([biufc](1|2|4|8|16)|[?bBhHiIlLqQefdFD]|[SU]\d{1,4})"


@dataclass(frozen=True)
class Name:
    """A function or class that a pickle names: ``torch.float32``. It is never looked up."""

    path: str


@dataclass(frozen=True)
class Storage:
    """Numbers beside the pickle. Args: key: which. dtype: torch's name, ``float32``. elements: as the pickle says."""

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as the pickle describes it: a window on a storage.

    Args:
        offset, shape, strides: in elements. dtype: torch's name. is_parameter: it was an ``nn.Parameter``.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_parameter: bool = False


@dataclass
class PlainObject:
    """An object that is read as what it holds, whatever its class would make of it.

    Args:
        kind: its class by name. attributes: by name. entries, items: of a class that is a dict or a list besides.
    """

    kind: str
    attributes: dict[str, Any] = field(default_factory=dict)
    entries: dict[Any, Any] = field(default_factory=dict)
    items: list[Any] = field(default_factory=list)

    def take(self, state: Any) -> None:
        """Keep a state: a mapping, or one with the values of slots in a second one; of any other the value itself."""
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        for part in parts:
            if isinstance(part, Mapping):
                self.attributes.update({str(key): value for key, value in part.items()})


class ArrayShell:
    """A numpy array that waits for its state."""

    def __init__(self) -> None:
        self.value: Any = None


class DtypeShell:
    """A numpy dtype by its code; its state says the byte order."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = ""


def finished(value: Any) -> Any:
    """A value; what numpy's pickles make in two steps as what it is in the end."""
    import numpy as np

    if isinstance(value, ArrayShell) and value.value is not None:
        return value.value
    if isinstance(value, DtypeShell):
        return np.dtype(value.order + value.code if value.order in ("<", ">") else value.code)
    return value


def _counted(values: Any) -> tuple[int, ...]:
    """A shape or strides: whole numbers, not negative, not too many."""
    found = tuple(values)
    if len(found) > MAX_DIMENSIONS or not all(type(item) is int and 0 <= item < 2**63 for item in found):
        raise ValueError("a shape whose sizes are not numbers")
    return found


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any, dtype: str | None = None) -> TensorRecord:
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor without numbers")
    sizes, steps = _counted(shape), _counted(strides)
    if len(sizes) != len(steps):
        raise ValueError("a tensor with more sizes than strides")
    return TensorRecord(storage, dtype or storage.dtype, offset, sizes, steps)


def _tensor_of_dtype(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TensorRecord:
    """``_rebuild_tensor_v3``: of an untyped storage, with the dtype as its fourth argument after the strides."""
    named = next((item for item in rest if isinstance(item, Name) and item.path.startswith("torch.")), None)
    if named is None:
        raise ValueError("a tensor without a dtype")
    return _tensor(storage, offset, shape, strides, dtype=named.path.removeprefix("torch."))


def _parameter(data: Any, *rest: Any) -> TensorRecord:
    if not isinstance(data, TensorRecord):
        raise ValueError("a parameter without a tensor")
    return TensorRecord(data.storage, data.dtype, data.offset, data.shape, data.strides, is_parameter=True)


def _of_type(function: Any, kind: Any, arguments: Any, state: Any = None) -> TensorRecord:
    """``_rebuild_from_type_v2``: a tensor with attributes, which are left out."""
    plain = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")
    if not isinstance(kind, Name) or kind.path not in plain or not isinstance(function, Name):
        raise ValueError(f"a tensor of the kind {getattr(kind, 'path', kind)!s:.80}")
    made = CALLS[function.path](*arguments)
    if not isinstance(made, TensorRecord):
        raise ValueError("a tensor that is none")
    return made


def _ordered(entries: Any = ()) -> dict[Any, Any]:
    made = {}
    for key, value in entries.items() if isinstance(entries, dict) else entries:
        if not isinstance(key, (str, int)):
            raise ValueError("a key that is not a string")
        made[key] = value
    return made


def _defaulted(*arguments: Any) -> dict[Any, Any]:
    return _ordered(*arguments[1:2])


def _bytes_of(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise ValueError("bytes made from something that is not text")
    return text.encode(encoding)


def _dtype(code: Any, *rest: Any) -> DtypeShell:
    import re

    if not isinstance(code, str) or re.fullmatch(_DTYPES, code) is None:
        raise ValueError("a dtype of objects")
    return DtypeShell(code)


def _scalar(dtype: Any, content: Any = b"") -> Any:
    import numpy as np

    if not isinstance(dtype, np.dtype):
        raise ValueError("a scalar of no dtype")
    if isinstance(content, str):
        content = content.encode("latin1")
    return np.frombuffer(content, dtype, 1)[0]


def array_of(version: Any, shape: Any, dtype: Any, fortran: Any, content: Any) -> np.ndarray[Any, Any]:
    """The state of a pickled array. Raises ValueError for objects, and for more numbers than there are bytes.

    The shape is the one that was pickled.
    """
    import numpy as np

    kind = finished(dtype)
    sizes = _counted(shape)
    if not isinstance(kind, np.dtype) or kind.hasobject or not isinstance(content, (bytes, bytearray, str)):
        raise ValueError("an array of objects")
    data = content.encode("latin1") if isinstance(content, str) else bytes(content)
    if math.prod(sizes) * kind.itemsize != len(data) or len(data) > MAX_INLINE_BYTES:
        raise ValueError("an array with more numbers than bytes")
    return np.frombuffer(data, kind).reshape(sizes, order="F" if fortran else "C").copy()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any = "C", *rest: Any) -> np.ndarray[Any, Any]:
    """An array as protocol 5 pickles it, its numbers in the pickle. The shape is the one that was pickled."""
    return array_of(1, shape, dtype, order == "F", content)


def _one_of(kind: str) -> Callable[..., PlainObject]:
    def make(*arguments: Any) -> PlainObject:
        return PlainObject(kind, {"arguments": arguments} if arguments else {})

    return make


def _path(*parts: Any) -> str:
    return str(PurePosixPath(*map(str, parts)))


def _set(items: Any = ()) -> set[Any]:
    return {item for item in items if isinstance(item, (str, int, float))}


def _complex(real: Any = 0.0, imag: Any = 0.0) -> complex:
    return complex(float(real), float(imag))


def _text(name: Any = "", *rest: Any) -> str:
    return name.path if isinstance(name, Name) else str(name)


_NUMPY = ("numpy.core", "numpy._core")
CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "collections.Counter": _ordered,
    "collections.defaultdict": _defaulted,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": lambda sizes=(): _counted(sizes),
    "torch.device": _text,
    "torch.serialization._get_layout": _text,
    "_codecs.encode": _bytes_of,
    # Lists as TorchScript writes them.
    **{f"torch.jit._pickle.build_{kind}list": list for kind in ("int", "tensor", "double", "bool")},
    "torch.jit._pickle.restore_type_tag": lambda value, tag=None: value,
    "numpy.dtype": _dtype,
    **{f"{base}.multiarray.scalar": _scalar for base in _NUMPY},
    **{f"{base}.multiarray._reconstruct": lambda *_: ArrayShell() for base in _NUMPY},
    **{f"{base}.numeric._frombuffer": _from_buffer for base in _NUMPY},
    **{f"{module}.set": _set for module in ("builtins", "__builtin__")},
    **{f"{module}.frozenset": _set for module in ("builtins", "__builtin__")},
    **{f"{module}.complex": _complex for module in ("builtins", "__builtin__")},
    **{
        f"pathlib.{kind}": _path
        for kind in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    },
    **{
        name: _one_of(name)
        for name in ("argparse.Namespace", "types.SimpleNamespace", "datetime.datetime", "datetime.timedelta")
    },
}
