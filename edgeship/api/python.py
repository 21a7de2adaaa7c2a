"""``edgeship.build`` and ``edgeship.plan``: a model, its inputs, and the words of the command line as arguments."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack

from edgeship.api.building import plan_order, run
from edgeship.api.bundles import Bundle
from edgeship.api.orders import Said, make_order
from edgeship.core.plan import Plan, Step
from edgeship.engine.cache import logs_folder
from edgeship.engine.chatter import Log
from edgeship.engine.executor import Progress
from edgeship.errors import UsageError


def build(
    model: Any,
    inputs: Any = None,
    *,
    progress: Progress | Callable[[str], None] | None = None,
    log: str | os.PathLike[str] | Log | None = None,
    **said: Unpack[Said],
) -> Bundle:
    """Build a model, check every artifact, and publish what holds as a bundle.

    What else can be said (target, runtime, profile, weights, calibration, eval, max_size, output ...) is what the
    command line takes; `edgeship.api.orders.Said` describes it.

    Args:
        model: an ``nn.Module``, an ``ExportedProgram``, a model of transformers, or a path or factory as on the command
            line.
        inputs: an example array or tensor, several, a dict of them by name, or specifications as text
            (``"image:f32[1,3,224,224]"``). A module is called with them by keyword where all are parameters of its
            ``forward``, and in this order otherwise.
        progress: what hears of the steps; a function such as ``print`` gets a line for each.
        log: where the libraries' chatter goes; a file in the cache by default.

    Returns:
        The bundle. Where a check fell short nothing is published, `Bundle.passed` is False, `Bundle.reasons` says why,
        and asking for an artifact raises `GateError`.

    Raises:
        EdgeshipError: bad input, an unsupported operator, a missing tool, an unwritable output.
    """
    order = make_order(model, inputs, **said)
    # A name of its own, so that two bundles that are built at once do not write into one log.
    if not isinstance(log, Log):
        log = Log(_log_of(order.bundle) if log is None else Path(log))
    return Bundle.built(order.bundle, run(order, _progress(progress), log))


def plan(model: Any, inputs: Any = None, **said: Unpack[Said]) -> Plan:
    """The steps that `build` would take, for the same arguments. The model is loaded, nothing is converted."""
    return plan_order(make_order(model, inputs, **said))


def _log_of(bundle: Path) -> Path:
    return logs_folder() / f"{bundle.name}.log"


class Lines:
    """A `Progress` that calls a function with a line for each step."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def started(self, step: Step) -> None:
        """Say nothing yet."""

    def moved(self, step: Step, done: int, total: int, what: str) -> None:
        """Say nothing: a notebook would fill with it."""

    def said(self, step: Step, line: str) -> None:
        """Tell what a step is about to do."""
        self._tell(f"{step.name}: {line}")

    def finished(self, step: Step, seconds: float, cached: bool) -> None:
        """Tell a step with its time."""
        self._tell(f"{step.name}: {'from cache' if cached else f'{seconds:.1f} s'}")

    def failed(self, step: Step) -> None:
        """Tell that a step failed."""
        self._tell(f"{step.name}: failed")


def _progress(given: Progress | Callable[[str], None] | None) -> Progress | None:
    if given is not None and not callable(given) and not hasattr(given, "started"):
        raise UsageError(f"progress is a {type(given).__name__}, not a function", fix="give one such as print")
    return Lines(given) if callable(given) else given


def _with_arguments(function: Any) -> None:
    """Show the arguments of `Said` one by one in ``help()`` and in notebooks."""
    shown = inspect.signature(function)
    own = [item for item in shown.parameters.values() if item.kind is not item.VAR_KEYWORD]
    names = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in Said.__annotations__.items()
    ]
    function.__signature__ = shown.replace(parameters=[*own, *names])


_with_arguments(build)
_with_arguments(plan)
