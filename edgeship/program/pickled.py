"""Read pickles without running anything: what a pickle would call is looked up in a table of our own, or refused.

A pickle is a program: it names functions and calls them. Here a name stays a name (`Name`), and a call is answered by
`CALLS`, which holds what checkpoints of tensors need: containers, tensors, numpy scalars, sizes, plain records such as
``argparse.Namespace``. Whatever else it would call is an `UnsafeSourceError` that says its name. No class is looked up,
no attribute is set, no hook is called; ``torch.load(weights_only=True)`` calls torch's own rebuilders and may be asked
for any amount of memory.

An object of a class that is not in the table is refused too, or read as the plain record of what it holds
(`PlainObject`) where the caller says so: hyperparameters of trainers, whole modules. Making one calls nothing here.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

from edgeship.compat.python import PlainUnpickler
from edgeship.errors import SourceError, UnsafeSourceError
from edgeship.program.pickled_values import (
    CALLS,
    ArrayShell,
    DtypeShell,
    Name,
    PlainObject,
    Storage,
    array_of,
    finished,
)

# Of one pickle; a checkpoint of 100,000 tensors has 15 MB. What it describes lies beside it, or in storages.
MAX_BYTES = 32 << 20
# How protocols 0 and 1 make an object of a class: the class is the first argument.
_MAKERS = ("copyreg._reconstructor", "copy_reg._reconstructor")
_WAY_OUT = "loading it would run code; save its state_dict as safetensors where you trust it"


def read_pickle(
    file: io.BufferedIOBase | io.BytesIO,
    what: str,
    *,
    storage: Callable[[tuple[Any, ...]], Storage] | None = None,
    fix: str = _WAY_OUT,
    inert: bool = False,
) -> Any:
    """One pickle from where ``file`` stands, as plain data: containers, numbers, texts, `TensorRecord`, numpy arrays.

    Args:
        what: names the file in errors. storage: makes a `Storage` of a persistent id; without it none may occur.
        fix: the way out of an `UnsafeSourceError`. inert: objects of any class become `PlainObject`; calls of functions
            that are not in the table are refused all the same.

    Raises:
        UnsafeSourceError: it would run code, or names what is not in our table. SourceError: damaged.
    """
    try:
        return finished(_Reader(file, what, storage, fix, inert).load())
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

    def __init__(
        self, file: Any, what: str, storage: Callable[[tuple[Any, ...]], Storage] | None, fix: str, inert: bool
    ) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self.what, self.fix, self._storage, self._inert = what, fix, storage, inert

    def find_class(self, module: str, name: str) -> Name:
        return Name(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        if self._storage is None or not isinstance(pid, tuple):
            raise SourceError(f"{self.what} refers to data that it does not contain", fix="download it again")
        return self._storage(pid)

    def call(self, function: Any, arguments: Any, *, made: bool = False) -> Any:
        """What a call in the pickle makes; with ``made`` an object of a class, which is not initialised."""
        if not isinstance(function, Name) or not isinstance(arguments, (tuple, list)):
            raise SourceError(f"{self.what} calls something that is not a function", fix="download it again")
        answer = CALLS.get(function.path)
        if answer is None:
            # What a class would make is kept as a record; its constructor would not be asked either.
            if made and self._inert:
                return PlainObject(function.path, {"arguments": tuple(arguments)} if arguments else {})
            if self._inert and function.path in _MAKERS and arguments and isinstance(arguments[0], Name):
                return PlainObject(arguments[0].path)
            raise UnsafeSourceError(
                f"{self.what} is a pickle that holds more than tensors: {function.path[:80]}", fix=self.fix
            )
        return answer(*map(finished, arguments))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.append(self.call(self.stack.pop(), arguments, made=True))

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
            made.take(state)
        elif isinstance(made, DtypeShell):
            made.order = str(state[1])
        elif isinstance(made, ArrayShell):
            made.value = array_of(*state)
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
        if isinstance(target, PlainObject):
            target = target.entries
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
        target = self.stack[-1]
        if isinstance(target, PlainObject):
            target = target.items
        if not isinstance(target, list):
            raise SourceError(f"{self.what} puts items into something that is not a list", fix="save it again")
        target.extend(items)

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
