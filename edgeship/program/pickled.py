"""Read pickles without running anything: what a pickle would call is looked up in a table of our own, or refused.

A pickle is a program: it names functions and calls them. Here a name stays a name (`Name`), and a call is answered by
`_CALLS`, which holds what checkpoints of tensors need: containers, tensors, numpy scalars, sizes, plain records such as
``argparse.Namespace``. Whatever else it would call is an `UnsafeSourceError` that says its name. No class is looked up,
no attribute is set, no hook is called; ``torch.load(weights_only=True)`` calls torch's own rebuilders and may be asked
for any amount of memory.

To read one more plain class, add a function to `_CALLS`; it is given the arguments as plain data.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

from edgeship.compat.python import PlainUnpickler
from edgeship.errors import SourceError, UnsafeSourceError

if TYPE_CHECKING:
    import numpy as np

# Of one pickle; a checkpoint of 100,000 tensors has 15 MB. What it describes lies beside it, or in storages.
MAX_BYTES = 32 << 20
MAX_DIMENSIONS = 64
# Numbers that a pickle may hold itself, in bytes: numpy scalars and small arrays of a trainer's.
MAX_INLINE_BYTES = 32 << 20
_DTYPES = r"[<>|=]?([biufc](1|2|4|8|16)|[?bBhHiIlLqQefdFD]|[SU]\d{1,4})"
_WAY_OUT = "loading it would run code; save its state_dict as safetensors where you trust it"


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
    """An object of a plain class that is read as its attributes only."""

    kind: str
    attributes: dict[str, Any] = field(default_factory=dict)


class _ArrayShell:
    """A numpy array that waits for its state."""

    def __init__(self) -> None:
        self.value: Any = None


class _DtypeShell:
    """A numpy dtype by its code; its state says the byte order."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = ""


def read_pickle(
    file: io.BufferedIOBase | io.BytesIO,
    what: str,
    *,
    storage: Callable[[tuple[Any, ...]], Storage] | None = None,
    fix: str = _WAY_OUT,
) -> Any:
    """One pickle from where ``file`` stands, as plain data: containers, numbers, texts, `TensorRecord`, numpy arrays.

    Args:
        what: names the file in errors. storage: makes a `Storage` of a persistent id; without it none may occur.
        fix: the way out of an `UnsafeSourceError`.

    Raises:
        UnsafeSourceError: it would run code, or names what is not in our table. SourceError: damaged.
    """
    try:
        return finished(_Reader(file, what, storage, fix).load())
    except SourceError:
        raise
    except RecursionError:
        raise SourceError(f"{what} is nested too deeply", fix="save it again") from None
    except Exception as error:  # a damaged pickle breaks the machine that reads it in many ways
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise SourceError(f"{what} is not a readable pickle: {reason}", fix="download it again") from None


def named_in(content: bytes) -> list[str]:
    """The functions and classes that a pickle names, in order, without reading it: what would run if it were loaded."""
    import pickletools

    found: list[str] = []
    texts: list[str] = []
    try:
        for code, argument, _ in pickletools.genops(content):
            if code.name in ("GLOBAL", "INST"):
                found.append(str(argument).replace(" ", "."))
            elif code.name == "STACK_GLOBAL" and len(texts) >= 2:
                found.append(".".join(texts[-2:]))
            elif isinstance(argument, str):
                texts.append(argument)
    except Exception:  # told as far as it goes
        found.append("what cannot be read")
    return list(dict.fromkeys(found))


class _Reader(PlainUnpickler):  # type: ignore[misc]
    """The standard library's reader in Python, with everything that calls, builds or looks up replaced.

    Python's own and not the one in C: that one allocates a table as large as the largest number a file says.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(PlainUnpickler.dispatch)

    def __init__(self, file: Any, what: str, storage: Callable[[tuple[Any, ...]], Storage] | None, fix: str) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self.what, self.fix, self._storage = what, fix, storage

    def find_class(self, module: str, name: str) -> Name:
        return Name(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        if self._storage is None or not isinstance(pid, tuple):
            raise SourceError(f"{self.what} refers to data that it does not contain", fix="download it again")
        return self._storage(pid)

    def call(self, function: Any, arguments: Any) -> Any:
        """What a call in the pickle makes."""
        if not isinstance(function, Name) or not isinstance(arguments, (tuple, list)):
            raise SourceError(f"{self.what} calls something that is not a function", fix="download it again")
        answer = _CALLS.get(function.path)
        if answer is None:
            raise UnsafeSourceError(
                f"{self.what} is a pickle that holds more than tensors: {function.path[:80]}", fix=self.fix
            )
        return answer(*map(finished, arguments))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.append(self.call(self.stack.pop(), arguments))

    def load_newobj_ex(self) -> None:
        if self.stack.pop():
            raise SourceError(f"{self.what} calls a class by keywords", fix="save its state_dict as safetensors")
        self.load_newobj()

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(self.call(klass, tuple(args)))

    def get_extension(self, code: int) -> None:
        raise SourceError(f"{self.what} uses pickle extension {code}", fix="save it again")

    def load_build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, PlainObject):
            if isinstance(state, tuple) and len(state) == 2:
                state = state[0]
            if isinstance(state, Mapping):
                made.attributes.update({str(key): value for key, value in state.items()})
        elif isinstance(made, _DtypeShell):
            made.order = str(state[1])
        elif isinstance(made, _ArrayShell):
            made.value = _array(*state)
            self.stack[-1] = made.value
        elif not isinstance(made, dict):  # an ordered dict's own attributes say nothing about its entries
            raise SourceError(f"{self.what} changes what cannot be changed", fix="save it again")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def load_setitems(self) -> None:
        self._fill(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._fill(items)

    def _fill(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise SourceError(f"{self.what} puts entries into something that is not a dict", fix="save it again")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self._key(key)] = value

    def _key(self, key: Any) -> Any:
        """A key that is plain: hashing a tuple that is nested 100,000 deep ends the process."""
        parts = key if isinstance(key, tuple) else (key,)
        if not all(part is None or isinstance(part, (str, bytes, int, float, Name)) for part in parts):
            raise SourceError(f"{self.what} has a key that is not a string", fix="save its state_dict as safetensors")
        return key

    def load_additems(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise SourceError(f"{self.what} puts entries into something that is not a set", fix="save it again")
        self.stack[-1].update(map(self._key, items))

    def load_frozenset(self) -> None:
        self.append(frozenset(map(self._key, self.pop_mark())))

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise SourceError(f"{self.what} puts items into something that is not a list", fix="save it again")
        self.stack[-1].extend(items)

    def load_get(self) -> None:
        self.append(finished(self.memo[int(self.readline()[:-1])]))

    def load_binget(self) -> None:
        self.append(finished(self.memo[self.read(1)[0]]))

    def load_long_binget(self) -> None:
        self.append(finished(self.memo[int.from_bytes(self.read(4), "little")]))

    def load_next_buffer(self) -> None:
        raise SourceError(f"{self.what} keeps buffers elsewhere", fix="save it again")

    for _code, _load in (
        (pickle.REDUCE, load_reduce), (pickle.NEWOBJ, load_newobj), (pickle.NEWOBJ_EX, load_newobj_ex),
        (pickle.BUILD, load_build), (pickle.SETITEM, load_setitem), (pickle.SETITEMS, load_setitems),
        (pickle.DICT, load_dict), (pickle.ADDITEMS, load_additems), (pickle.FROZENSET, load_frozenset),
        (pickle.APPEND, load_append), (pickle.APPENDS, load_appends), (pickle.NEXT_BUFFER, load_next_buffer),
        (pickle.GET, load_get), (pickle.BINGET, load_binget), (pickle.LONG_BINGET, load_long_binget),
    ):  # fmt: skip
        dispatch[_code[0]] = _load


def finished(value: Any) -> Any:
    """A value; what numpy's pickles make in two steps as what it is in the end."""
    import numpy as np

    if isinstance(value, _ArrayShell) and value.value is not None:
        return value.value
    if isinstance(value, _DtypeShell):
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
    made = _CALLS[function.path](*arguments)
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


def _dtype(code: Any, *rest: Any) -> _DtypeShell:
    import re

    if not isinstance(code, str) or re.fullmatch(_DTYPES, code) is None:
        raise ValueError("a dtype of objects")
    return _DtypeShell(code)


def _scalar(dtype: Any, content: Any = b"") -> Any:
    import numpy as np

    if not isinstance(dtype, np.dtype):
        raise ValueError("a scalar of no dtype")
    if isinstance(content, str):
        content = content.encode("latin1")
    return np.frombuffer(content, dtype, 1)[0]


def _array(version: Any, shape: Any, dtype: Any, fortran: Any, content: Any) -> np.ndarray[Any, Any]:
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
_CALLS: Mapping[str, Callable[..., Any]] = {
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
    "numpy.dtype": _dtype,
    **{f"{base}.multiarray.scalar": _scalar for base in _NUMPY},
    **{f"{base}.multiarray._reconstruct": lambda *_: _ArrayShell() for base in _NUMPY},
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
