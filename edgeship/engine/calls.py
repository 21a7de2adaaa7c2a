"""What a build and its worker processes say to each other, and how errors come across whole."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeship.core.model import Model
from edgeship.core.passes import Pass


@dataclass(frozen=True)
class Warm:
    """Modules to import while nothing else is to do; what cannot be imported is left to the step that needs it."""

    modules: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """A pass to run.

    Args:
        folder: an empty folder that it writes to. log: a new file for what it prints. temporary: a folder of its own
            for files that it needs meanwhile. shared: for what steps of the build leave for each other.
    """

    task: Pass
    inputs: Mapping[str, Model]
    folder: Path
    log: Path
    temporary: Path
    shared: Path | None = None


@dataclass(frozen=True)
class Said:
    """What a running pass tells: the name of a function of `Context`, and what it was called with."""

    function: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Answer:
    """How a call ended.

    Args:
        result: what the pass made; None when it raised. error: what it raised, else None.
        author: the plug-in in whose code the error arose; empty when in edgeship's.
    """

    result: Any = None
    error: BaseException | None = None
    author: str = ""


def portable(value: Any) -> Any:
    """A value as another process reads it: the very same where nothing is lost, else None."""
    try:
        copy = pickle.loads(pickle.dumps(value))
    except Exception:  # whatever its class raises
        return None
    return value if type(copy) is type(value) and str(copy) == str(value) else None


def foreign(error: BaseException) -> Foreign:
    """An error that cannot be handed between processes, under its own name."""
    return _foreign(type(error).__name__, str(error))


def _foreign(name: str, text: str) -> Foreign:
    made: type[Foreign] = type(name, (Foreign,), {"__module__": Foreign.__module__})
    return made(name, text)


class Foreign(Exception):
    """Base of errors whose own classes cannot be handed between processes."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self._name, self._text = name, text

    def __reduce__(self) -> tuple[Any, ...]:
        return _foreign, (self._name, self._text)
