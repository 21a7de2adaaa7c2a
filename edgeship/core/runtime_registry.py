"""The runtimes that are there, apart from `edgeship.core.registry`: a request asks for its runtime, and passes, which
the registry knows too, are planned from requests."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from typing import TypeVar

from edgeship.core.model import Artifact
from edgeship.core.plugins import loaded, refuse
from edgeship.core.runtimes import Runtime

T = TypeVar("T")


@cache
def runtimes() -> dict[str, Runtime]:
    """Every runtime by name."""
    return instances("runtimes", Runtime, _unfit_runtime)  # type: ignore[type-abstract]


def instances(
    group: str, cls: type[T], unfit: Callable[[T, Mapping[str, T]], str] = lambda value, found: ""
) -> dict[str, T]:
    """One instance a module of ``edgeship/<group>/`` (a folder keeps it in ``runtime.py``), then those of plug-ins.

    Args:
        unfit: why an instance cannot be used beside those that were found; empty when it can.
    """
    found: dict[str, T] = {}
    package = importlib.import_module(f"edgeship.{group}")
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda item: item.name):
        place = f"{package.__name__}.{info.name}" + (".runtime" if info.ispkg else "")
        if importlib.util.find_spec(place) is not None:
            for value in vars(importlib.import_module(place)).values():
                if isinstance(value, cls):
                    found[_name(value)] = value
    for name, value in loaded(f"edgeship.{group}"):
        reason = "" if isinstance(value, cls) and _name(value) else f"is not a {cls.__name__} with a name"
        if not reason and _name(value) in found:
            reason = f"{_name(value)} exists already"
        reason = reason or unfit(value, found)
        if reason:
            refuse(f"edgeship.{group}", name, reason)
        else:
            found[_name(value)] = value
    return found


def _name(value: object) -> str:
    return str(getattr(value, "name", ""))


def _unfit_runtime(runtime: Runtime, found: Mapping[str, Runtime]) -> str:
    """Why a runtime cannot be used beside others; empty when it can."""
    missing = [item for item in ("title", "artifact", "format", "engine") if not hasattr(runtime, item)]
    if missing:
        return f"has no {missing[0]}"
    kind = runtime.artifact
    if not (isinstance(kind, type) and issubclass(kind, Artifact)):
        return "its artifact is no class of Artifact"
    if "kind" not in vars(kind) or kind.runtime != runtime.name:
        return f"{kind.__name__} needs a kind of its own, and runtime {runtime.name!r}"
    for other in found.values():
        if other.artifact.kind == kind.kind:
            return f"{other.name} opens a {kind.kind} already"
        if other.format.name == runtime.format.name and other.format != runtime.format:
            return f"{other.name} has another format {runtime.format.name}"
    return ""
