"""A plan: the steps that a build will take, in order, printed before it runs."""

from __future__ import annotations

from dataclasses import dataclass

from edgeship.core.model import Model
from edgeship.core.passes import Pass
from edgeship.core.records import to_plain
from edgeship.core.report import Refusal


@dataclass(frozen=True)
class Step:
    """One configured pass and where its inputs come from.

    Args:
        index: place in the plan. task: the configured pass.
        inputs: parameter name -> index of the step that makes it, or -1 for the source.
        routes: (target, runtime) pairs that need it; shared steps run once.
    """

    index: int
    task: Pass
    inputs: dict[str, int]
    made: str
    routes: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """The pass's name."""
        return self.task.name

    @property
    def options(self) -> dict[str, object]:
        """The pass's fields as plain data."""
        plain: dict[str, object] = to_plain(self.task)
        return {key: value for key, value in plain.items() if value is not None}

    def describe(self) -> str:
        """One line: number, pass, what it makes, options, inputs, targets."""
        shown = []
        for key, value in self.options.items():
            brief = _brief(value)
            if brief:
                shown.append(f"{key}={brief}")
        origins = dict.fromkeys("source" if index < 0 else str(index) for index in self.inputs.values())
        targets = dict.fromkeys(target for target, _ in self.routes)
        head = f"{self.index:<3}{self.name:<27}{self.made:<14}{' '.join(shown)}"
        return f"{head}  <- {','.join(origins)}  [{','.join(targets)}]"

    def plain(self) -> dict[str, object]:
        """The step as JSON-ready data."""
        return {
            "index": self.index,
            "pass": self.name,
            "makes": self.made,
            "options": self.options,
            "inputs": self.inputs,
            "routes": [list(route) for route in self.routes],
        }


def _brief(value: object) -> str:
    if isinstance(value, dict):
        value = value.get("reference") or value.get("name") or ""
    if isinstance(value, (list, tuple)):
        return ",".join(_brief(item) if isinstance(item, dict) else str(item) for item in value)[:60]
    return "" if value in ("", None) or value is False else str(value)[:60]


@dataclass(frozen=True)
class Plan:
    """Steps in order, what was skipped with its reason, and the routes that cannot be planned with theirs."""

    steps: tuple[Step, ...]
    skipped: dict[str, str]
    refused: tuple[Refusal, ...] = ()

    def text(self) -> str:
        """The plan as people read it."""
        lines = [step.describe() for step in self.steps]
        lines += [f"-  {name:<27}skipped: {reason}" for name, reason in self.skipped.items()]
        lines += [f"x  {refusal}" for refusal in self.refused]
        return "\n".join(lines)

    def plain(self) -> dict[str, object]:
        """The plan as JSON-ready data."""
        told: dict[str, object] = {"steps": [step.plain() for step in self.steps], "skipped": self.skipped}
        if self.refused:
            told["refused"] = [to_plain(item) for item in self.refused]
        return told


def made_name(made: object) -> str:
    """The name of a pass's result type."""
    if isinstance(made, type):
        return made.kind if issubclass(made, Model) else made.__name__
    return str(made)
