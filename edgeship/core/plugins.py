"""Plug-ins: objects of other packages, by entry point. One that fails is kept as `Broken`, and never stops a build."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any


@dataclass(frozen=True)
class Broken:
    """A plug-in that could not be loaded."""

    group: str
    name: str
    reason: str


# An attribute of errors that came from another process: what `author_of` said there.
AUTHOR = "_edgeship_author"
_broken: dict[tuple[str, str], Broken] = {}
# Packages that plug-ins are from, as Python imports them.
_packages: set[str] = set()


def loaded(group: str) -> Iterator[tuple[str, Any]]:
    """What the entry points of a group name, by their names; those that do not load are refused."""
    if os.environ.get("EDGESHIP_NO_PLUGINS"):
        return
    for point in metadata.entry_points(group=group):
        try:
            value = point.load()
        except (Exception, SystemExit) as error:
            refuse(group, point.name, f"{type(error).__name__}: {error}")
        else:
            # A class, a function or an instance: each knows its module, which lies in the outermost package.
            _packages.add(str(getattr(value, "__module__", "")).partition(".")[0])
            yield point.name, value


def packages_of(group: str) -> dict[str, str]:
    """Distributions with entry points of a group, and their versions."""
    if os.environ.get("EDGESHIP_NO_PLUGINS"):
        return {}
    found = (point.dist for point in metadata.entry_points(group=group))
    return {dist.name: dist.version for dist in found if dist is not None}


def refuse(group: str, name: str, reason: str) -> None:
    """Keep a plug-in as broken, for ``doctor``."""
    _broken[group, name] = Broken(group, name, reason)


def author_of(error: BaseException) -> str:
    """The package of the plug-in in whose code an error arose; empty where it arose in edgeship's.

    Of all calls on the way, the innermost that is edgeship's or a plug-in's decides: what a library raises is of its
    caller.
    """
    if hasattr(error, AUTHOR):
        return str(getattr(error, AUTHOR))
    author, trace = "", error.__traceback__
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if package == "edgeship" or package in _packages:
            author = package
        trace = trace.tb_next
    return author if author in _packages else ""


def refused() -> tuple[Broken, ...]:
    """Plug-ins that failed so far."""
    return tuple(_broken.values())
