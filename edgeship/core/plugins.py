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


_broken: dict[tuple[str, str], Broken] = {}


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
            yield point.name, value


def refuse(group: str, name: str, reason: str) -> None:
    """Keep a plug-in as broken, for ``doctor``."""
    _broken[group, name] = Broken(group, name, reason)


def refused() -> tuple[Broken, ...]:
    """Plug-ins that failed so far."""
    return tuple(_broken.values())
