"""What a pass is: a typed function with options, that plans itself.

A pass is a frozen dataclass. Its fields are its options; the annotations of ``run`` are its place in the graph: a
parameter whose type is a `Model` is an input edge, the return type is the node it makes.

  - *bridge*: makes another kind (Source -> TorchModel, TorchModel -> OnnxModel);
  - *refinement*: keeps the kind (TorchModel -> TorchModel);
  - *check*: ends in a Verdict; *measure*: ends in Measurements;
  - *gather*: takes everything the build made, once, at its end (package).

Parameter names mean something to the planner: ``model`` is the newest model of that kind on the route, ``reference``
the TorchModel that was lowered, ``original`` the TorchModel as loaded.
"""

from __future__ import annotations

import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from edgeship.core.model import Model
from edgeship.core.profile import Request
from edgeship.core.report import Measurements

Shape = Literal["bridge", "refinement", "check", "measure", "gather"]
# Fields that ``--set`` may not bend, with what decides them: the step would run on something else than the plan says.
DECIDED: Mapping[str, str] = {
    "runtime": "--runtime",
    "reference": "the source",
    "factory": "--factory",
    "key": "--weights-key",
    "inputs": "--input",
    "outputs": "--output-name",
    "cut": "--cut",
    "notes": "sample.toml",
    "data": "--calibration or --eval",
    "activations": "--profile",
    "choice": "--profile",
}


@dataclass(frozen=True)
class Skip:
    """A pass declines, and says why."""

    reason: str


def _no_progress(done: int, total: int, what: str) -> None:
    pass


@dataclass(frozen=True)
class Context:
    """What a running pass may use besides its inputs.

    Args:
        folder: an empty folder; everything the pass writes goes there, and is kept with its result.
        progress: ``progress(done, total, what)`` for steps that people wait for.
        log: one line for the log file. say: one line for people, before something that takes long.
        shared: a folder for what steps of one build leave for each other, each under a digest of all that decides it;
            None where nothing is to be left.
    """

    folder: Path
    progress: Callable[[int, int, str], None] = _no_progress
    log: Callable[[str], None] = field(default=lambda line: None)
    say: Callable[[str], None] = field(default=lambda line: None)
    shared: Path | None = None


class Pass(ABC):
    """Base of all passes. The first line of a subclass's docstring is what ``edgeship passes`` prints.

    Class attributes:
        name: ``folder/file``. tools: distributions whose versions decide the result, part of the cache key.
        settles: what a refinement decides ("weights", "activations"); the plan shows it.
        after, before: refinements that come before this one, and behind it, when both are planned.
        decided: fields that are no options, and what decides them instead, beyond `DECIDED`.
        limits: options that decide what passes a check; the report says which were set by hand.
        cached: False for passes that write outside their folder.
        local: True when the result holds on this machine only (timings): the machine is then part of the cache key.
    """

    name: ClassVar[str]
    tools: ClassVar[tuple[str, ...]] = ()
    settles: ClassVar[str] = ""
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()
    decided: ClassVar[Mapping[str, str]] = {}
    limits: ClassVar[tuple[str, ...]] = ()
    cached: ClassVar[bool] = True
    local: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Itself, configured for this request, or why not."""

    run: ClassVar[Callable[..., Any]]

    def confirm(self, request: Request) -> None:  # noqa: B027  most passes have nothing to refuse
        """Called while planning, once the options are final: raise an `EdgeshipError` when they cannot be met."""

    def ensures(self, output: Any, **inputs: Any) -> None:  # noqa: B027  a promise is optional
        """Check the promise of the pass on its output; raise an `EdgeshipError` when it is broken."""

    @classmethod
    def follows(cls) -> dict[str, str]:
        """Fields that ``--set`` does not take, with what decides each: they are not options to a user."""
        decided = {**DECIDED, **cls.decided}
        hints = typing.get_type_hints(cls)
        names = [item.name for item in fields(cls)]  # type: ignore[arg-type]
        plain = {name for name in names if _is_written(hints[name])}
        return {name: decided.get(name, "the request") for name in names if name in decided or name not in plain}

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Fields that ``--set`` takes."""
        return tuple(item.name for item in fields(cls) if item.name not in cls.follows())  # type: ignore[arg-type]

    @classmethod
    def edges(cls) -> tuple[dict[str, type[Model]], Any]:
        """Input edges by parameter name, and the type it makes, both read from ``run``."""
        hints = typing.get_type_hints(cls.run)
        made = hints.pop("return", None)
        inputs = {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Model)}
        return inputs, made

    @classmethod
    def shape(cls) -> Shape:
        """Its shape in the graph, from its edges."""
        inputs, made = cls.edges()
        if isinstance(made, type) and issubclass(made, Model):
            return "refinement" if inputs.get("model") is made else "bridge"
        if not inputs:
            return "gather"
        return "measure" if made is Measurements else "check"

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""


def _is_written(hint: Any) -> bool:
    """Whether a value of this type can be written as text: numbers, words, and lists of them."""
    if typing.get_origin(hint) is Literal or hint in (int, float, bool, str, type(None), ...):
        return True
    inner = typing.get_args(hint)
    nested = typing.get_origin(hint) is tuple and any(typing.get_origin(item) is tuple for item in inner)
    return bool(inner) and not nested and typing.get_origin(hint) is not dict and all(map(_is_written, inner))
