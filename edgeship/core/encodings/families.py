"""The families that there are: those of this folder, and those that packages add.

A package adds one with an entry point of the group ``edgeship.encodings`` that names the class
(docs/adding-an-encoding.md).
"""

from __future__ import annotations

from functools import cache

from edgeship.core.encodings.affine import Affine
from edgeship.core.encodings.family import Encoding
from edgeship.core.encodings.floats import Float
from edgeship.core.encodings.mxfp4 import MXFP4
from edgeship.core.encodings.palette import Palette
from edgeship.core.encodings.sparse import Sparse
from edgeship.core.plugins import loaded, refuse
from edgeship.core.records import open_union
from edgeship.errors import UsageError

GROUP = "edgeship.encodings"
BUILT_IN: tuple[type[Encoding], ...] = (Float, Affine, Palette, MXFP4, Sparse)


@cache
def families() -> dict[str, type[Encoding]]:
    """Every family by its kind. A plug-in that is no family, or takes a kind that is there, is kept as broken."""
    found = {family.kind: family for family in BUILT_IN}
    for name, value in loaded(GROUP):
        reason = _unfit(value) or (f"{value.kind} exists already" if value.kind in found else "")
        if reason:
            refuse(GROUP, name, reason)
        else:
            found[value.kind] = value
    return found


def of_kind(kind: str) -> type[Encoding]:
    """The family of a kind, as records name it. Raises `UsageError` when there is none."""
    if kind not in families():
        raise UsageError(
            f"no family of encodings is called {kind!r}", fix=f"known: {', '.join(families())}; install its package"
        )
    return families()[kind]


def encoding_named(text: str) -> Encoding:
    """The encoding of a short name. Raises `UsageError` with examples for what is none."""
    for family in families().values():
        found = family.named(text)
        if found is not None:
            return found
    raise UsageError(f'"{text}" is no encoding', fix=f"write one like {', '.join(examples())}")


def examples() -> tuple[str, ...]:
    """A few short names of every family."""
    return tuple(name for family in families().values() for name in family.examples)


def _unfit(value: object) -> str:
    """Why an object is no family; empty when it is one."""
    import dataclasses
    import inspect

    if not (isinstance(value, type) and issubclass(value, Encoding)):
        return "is no subclass of Encoding"
    if not getattr(value, "kind", ""):
        return "has no kind"
    if inspect.isabstract(value) or not dataclasses.is_dataclass(value):
        return "is no frozen dataclass with named, short_name, rebuild and a text"
    return ""


open_union(Encoding, of_kind)
