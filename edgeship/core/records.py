"""JSON and TOML to frozen dataclasses and back. Errors name the file and the key."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from edgeship.errors import ArtifactError, EdgeshipError, UsageError

T = TypeVar("T")
MAX_TOML_BYTES = 1 << 20
# Base class -> what finds the class of a kind, where packages may add more.
_open: dict[type, Callable[[str], type]] = {}


def open_union(base: type, of_kind: Callable[[str], type]) -> None:
    """Read a ``base`` in records as the class that its ``kind`` names.

    Args:
        of_kind: the class of a kind; raises `UsageError` when there is none.
    """
    _open[base] = of_kind


def to_plain(value: Any) -> Any:
    """A record as dicts, lists and scalars. Dataclasses that carry a ``kind`` keep it, so that unions read back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        kind = getattr(type(value), "kind", None)
        return {"kind": kind, **fields} if kind else fields
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [to_plain(item) for item in value]
        return sorted(items) if isinstance(value, (set, frozenset)) else items
    return value


def from_plain(cls: type[T], data: Any, where: str = "") -> T:
    """A record of type ``cls`` from plain data. Raises `UsageError` that names the key, with the nearest real one."""
    return cast(T, _convert(cls, data, where or cls.__name__))


def _convert(hint: Any, data: Any, where: str) -> Any:
    """``data`` as what a type hint says. Raises `UsageError` that names the key where it is something else."""
    if hint is Any:
        return data
    origin = get_origin(hint)
    if origin in _GENERIC:
        return _GENERIC[origin](get_args(hint), data, where)
    if dataclasses.is_dataclass(hint):
        return _convert_record(cast(type, hint), data, where)
    if isinstance(hint, type) and hint in _open:
        return _convert_open(hint, data, where)
    return _convert_scalar(hint, data, where)


def _convert_scalar(hint: Any, data: Any, where: str) -> Any:
    if hint is Path:
        if not isinstance(data, str):
            raise UsageError(f"{where}: expected a path, found {data!r}")
        return Path(data)
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if isinstance(hint, type) and (not isinstance(data, hint) or (isinstance(data, bool) and hint is not bool)):
        raise UsageError(f"{where}: expected {hint.__name__}, found {data!r}")
    return data


def _convert_open(base: type, data: Any, where: str) -> Any:
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if not isinstance(kind, str):
        raise UsageError(f"{where}: expected a table with a kind, found {data!r}")
    return _convert_record(_open[base](kind), data, where)


def _convert_literal(args: tuple[Any, ...], data: Any, where: str) -> Any:
    if not any(data == arg and type(data) is type(arg) for arg in args):
        raise UsageError(f"{where}: {data!r} is not one of {', '.join(map(str, args))}")
    return data


def _convert_tuple(args: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, (list, tuple)):
        raise UsageError(f"{where}: expected a list, found {data!r}")
    inner = [args[0]] * len(data) if len(args) == 2 and args[1] is Ellipsis else list(args)
    if len(inner) != len(data):
        raise UsageError(f"{where}: expected {len(inner)} items, found {len(data)}")
    pairs = enumerate(zip(inner, data, strict=True))
    return tuple(_convert(item, value, f"{where}[{i}]") for i, (item, value) in pairs)


def _convert_table(args: tuple[Any, ...], data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise UsageError(f"{where}: expected a table, found {data!r}")
    return {key: _convert(args[1], item, f"{where}.{key}") for key, item in data.items()}


def _convert_union(args: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in args:
        return None
    choices = [arg for arg in args if arg is not type(None)]
    if isinstance(data, Mapping) and "kind" in data:
        for choice in choices:
            if getattr(choice, "kind", None) == data["kind"]:
                return _convert(choice, data, where)
    errors: list[EdgeshipError] = []
    for choice in choices:
        try:
            return _convert(choice, data, where)
        except UsageError as error:
            errors.append(error)
    raise errors[0]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The types of a class's fields; working them out takes longer than all else here."""
    return typing.get_type_hints(cls)


def _convert_record(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise UsageError(f"{where}: expected a table, found {data!r}")
    hints = _hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    values = {}
    for key, item in data.items():
        if key == "kind" and key not in names:
            continue
        if key not in names:
            raise UsageError(f"{where}: unknown key {key!r}", fix=suggest(key, names))
        values[key] = _convert(hints[key], item, f"{where}.{key}")
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise UsageError(f"{where}: key {field.name!r} is missing")
    try:
        return cls(**values)
    except EdgeshipError as error:
        raise UsageError(f"{where}: {error.what}", fix=error.fix) from None


_GENERIC: dict[Any, Callable[[tuple[Any, ...], Any, str], Any]] = {
    Literal: _convert_literal,
    Union: _convert_union,
    types.UnionType: _convert_union,
    tuple: _convert_tuple,
    dict: _convert_table,
    Mapping: _convert_table,
}


def suggest(name: str, known: Iterable[str]) -> str:
    """The way out for a name nobody knows: the nearest real one, or the whole list."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def read_json(cls: type[T], path: Path) -> T:
    """Read a record from a JSON file; a damaged file is an `ArtifactError`."""
    try:
        return from_plain(cls, json.loads(path.read_text(encoding="utf-8")), path.name)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing", fix="build again") from None
    except ValueError as error:  # no JSON, no UTF-8, or a number of too many digits
        raise ArtifactError(f"{path} is not valid JSON: {error}", fix="build again") from None
    except RecursionError:
        raise ArtifactError(f"{path} is nested too deeply", fix="build again") from None
    except UsageError as error:
        raise ArtifactError(f"{path} does not have the expected form: {error}", fix="build again") from None


def write_json(path: Path, value: Any) -> None:
    """Write a record as JSON, keys in field order, two spaces, newline at the end."""
    path.write_text(json.dumps(to_plain(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_toml(cls: type[T], path: Path) -> T:
    """Read a record from a TOML file; errors name the file and the key."""
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > MAX_TOML_BYTES):
            raise UsageError(f"{path} is not a TOML file", fix="give a TOML file")
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", fix="give a TOML file") from None
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply", fix="correct the file") from None
    except ValueError as error:  # no TOML, no UTF-8, or a number of too many digits
        raise UsageError(f"{path}: {error}", fix="correct the file") from None
    return from_plain(cls, data, path.name)
