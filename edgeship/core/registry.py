"""What is there: passes, runtimes, targets and profiles, built in by folder and added by entry points.

Entry point groups: ``edgeship.passes`` and ``edgeship.runtimes`` name an object (a Pass subclass, a Runtime instance);
``edgeship.targets`` and ``edgeship.profiles`` name a function returning a folder of TOML files. A plug-in that fails to
load is kept as `Broken` for ``doctor`` and never stops a build.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from edgeship.core.passes import Pass
from edgeship.core.profile import Profile
from edgeship.core.records import read_toml, suggest
from edgeship.core.runtimes import Runtime
from edgeship.core.target import Target
from edgeship.errors import UsageError

T = TypeVar("T")
STAGES = ("load", "compress", "lower", "check", "ship")


@dataclass(frozen=True)
class Broken:
    """A plug-in that could not be loaded."""

    group: str
    name: str
    reason: str


_broken: dict[tuple[str, str], Broken] = {}


def broken() -> tuple[Broken, ...]:
    """Plug-ins that failed to load, after everything was asked for once."""
    for ask in (passes, runtimes, targets, profiles):
        ask()
    return tuple(_broken.values())


@cache
def passes() -> dict[str, type[Pass]]:
    """Every pass by name, in the order of the stages."""
    found: dict[str, type[Pass]] = {}
    for stage in STAGES:
        package = importlib.import_module(f"edgeship.passes.{stage}")
        for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda item: item.name):
            module = importlib.import_module(f"edgeship.passes.{stage}.{info.name}")
            for value in vars(module).values():
                if isinstance(value, type) and issubclass(value, Pass) and value.__module__ == module.__name__:
                    found[value.name] = value
    for name, value in _plugins("edgeship.passes"):
        if not (isinstance(value, type) and issubclass(value, Pass)):
            _broken["edgeship.passes", name] = Broken("edgeship.passes", name, "is not a Pass")
        elif value.name in found:
            _broken["edgeship.passes", name] = Broken("edgeship.passes", name, f"{value.name} exists already")
        else:
            found[value.name] = value
    return found


@cache
def runtimes() -> dict[str, Runtime]:
    """Every runtime by name."""
    found: dict[str, Runtime] = {}
    package = importlib.import_module("edgeship.runtimes")
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda item: item.name):
        place = f"{package.__name__}.{info.name}" + (".runtime" if info.ispkg else "")
        if importlib.util.find_spec(place) is not None:
            runtime = getattr(importlib.import_module(place), "RUNTIME", None)
            if isinstance(runtime, Runtime):
                found[runtime.name] = runtime
    for name, value in _plugins("edgeship.runtimes"):
        if not isinstance(value, Runtime):
            _broken["edgeship.runtimes", name] = Broken("edgeship.runtimes", name, "is not a Runtime")
        elif value.name in found:
            _broken["edgeship.runtimes", name] = Broken("edgeship.runtimes", name, f"{value.name} exists already")
        else:
            found[value.name] = value
    return found


@cache
def targets() -> dict[str, Target]:
    """Every target by name."""
    return _records("targets", Target)


@cache
def profiles() -> dict[str, Profile]:
    """Every profile by name."""
    return _records("profiles", Profile)


def find(kind: str, known: dict[str, T], name: str) -> T:
    """One entry by name; an unknown name is a `UsageError` that suggests the nearest."""
    if name not in known:
        raise UsageError(f'no {kind} "{name}"', fix=suggest(name, known))
    return known[name]


def _records(group: str, cls: type[T]) -> dict[str, T]:
    found: dict[str, T] = {}
    for path in sorted(_toml_folder(group).glob("*.toml")):
        found[path.stem] = read_toml(cls, path)
    for name, value in _plugins(f"edgeship.{group}"):
        try:
            for path in sorted(Path(value()).glob("*.toml")):
                found.setdefault(path.stem, read_toml(cls, path))
        except Exception as error:
            _broken[f"edgeship.{group}", name] = Broken(f"edgeship.{group}", name, str(error))
    return found


def _toml_folder(group: str) -> Path:
    package = Path(__file__).resolve().parents[1]
    shipped, checkout = package / group, package.parent / group
    return shipped if shipped.is_dir() else checkout


def _plugins(group: str) -> Iterator[tuple[str, Any]]:
    if os.environ.get("EDGESHIP_NO_PLUGINS"):
        return
    for point in metadata.entry_points(group=group):
        try:
            yield point.name, point.load()
        except Exception as error:
            _broken[group, point.name] = Broken(group, point.name, f"{type(error).__name__}: {error}")
