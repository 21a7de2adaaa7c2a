"""What is there: passes, runtimes, devices, targets and profiles, built in by folder and added by entry points; and
from passes and runtimes the kinds of models that steps make, the cache reads and a bundle holds.

Entry point groups: ``edgeship.passes``, ``edgeship.runtimes`` and ``edgeship.devices`` name an object (a Pass subclass,
a Runtime, a Device), ``edgeship.encodings`` a family (a subclass of Encoding); ``edgeship.targets`` and
``edgeship.profiles`` name a function returning a folder of TOML files.
A plug-in that fails to load is kept as `Broken` for ``doctor`` and never stops a build.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from edgeship.core.device import Device
from edgeship.core.encodings import families
from edgeship.core.model import Artifact, KeptFiles, Model
from edgeship.core.passes import Pass
from edgeship.core.plugins import Broken, loaded, refuse, refused
from edgeship.core.profile import Profile
from edgeship.core.records import read_toml, suggest
from edgeship.core.runtime_registry import instances, runtimes
from edgeship.core.target import Target
from edgeship.errors import UsageError

__all__ = ["Broken", "broken", "devices", "find", "passes", "profiles", "runtimes", "targets"]

T = TypeVar("T")
STAGES = ("load", "compress", "lower", "check", "ship")


def broken() -> tuple[Broken, ...]:
    """Plug-ins that failed to load, after everything was asked for once."""
    for ask in (passes, runtimes, devices, targets, profiles, families):
        ask()
    return refused()


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
    for name, value in loaded("edgeship.passes"):
        reason = _unfit_pass(value) or (f"{value.name} exists already" if value.name in found else "")
        reason = reason or _unfit_kind(value, found.values())
        if reason:
            refuse("edgeship.passes", name, reason)
        else:
            found[value.name] = value
    return found


@cache
def artifacts() -> dict[str, type[Artifact]]:
    """What a bundle can hold, by kind: the artifact of every runtime."""
    return {runtime.artifact.kind: runtime.artifact for runtime in runtimes().values()}


@cache
def kinds() -> dict[str, type[Model]]:
    """Every model that a step can make, by kind: what passes say that they make, and what runtimes open."""
    made = [cls.edges()[1] for cls in passes().values()]
    models: list[type[Model]] = [KeptFiles, *artifacts().values()]
    models += [cls for cls in made if isinstance(cls, type) and issubclass(cls, Model)]
    return {cls.kind: cls for cls in models}


@cache
def devices() -> dict[str, Device]:
    """Every device by name."""
    return instances("devices", Device)  # type: ignore[type-abstract]


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
    for name, value in loaded(f"edgeship.{group}"):
        try:
            added = {path.stem: read_toml(cls, path) for path in sorted(Path(value()).glob("*.toml"))}
            twice = sorted(added.keys() & found.keys())
            if twice:
                raise UsageError(f"{twice[0]} exists already")
            found.update(added)
        except Exception as error:
            refuse(f"edgeship.{group}", name, str(error) or type(error).__name__)
    return found


def _unfit_pass(value: Any) -> str:
    """Why an object cannot be planned as a pass; empty when it can."""
    if not (isinstance(value, type) and issubclass(value, Pass)):
        return "is not a Pass"
    if not getattr(value, "name", ""):
        return "has no name"
    if inspect.isabstract(value) or not dataclasses.is_dataclass(value):
        return "is not a frozen dataclass with plan and run"
    try:
        value.shape()
    except Exception as error:
        return f"the annotations of run cannot be read: {type(error).__name__}: {error}"
    return ""


def _unfit_kind(cls: type[Pass], others: Iterable[type[Pass]]) -> str:
    """Why what a pass makes cannot be told from what another makes; empty when it can."""
    made = cls.edges()[1]
    if not (isinstance(made, type) and issubclass(made, Model)):
        return ""
    if "kind" not in vars(made):
        return f"{made.__name__} has no kind of its own"
    known = [other.edges()[1] for other in others]
    twice = any(getattr(other, "kind", "") == made.kind and other is not made for other in known)
    return f"it makes another {made.kind} than there is" if twice else ""


def _toml_folder(group: str) -> Path:
    package = Path(__file__).resolve().parents[1]
    shipped, checkout = package / group, package.parent / group
    return shipped if shipped.is_dir() else checkout
