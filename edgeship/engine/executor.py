"""From a plan to results: run each step or take it from the cache, check its promise, tell how long it took."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from edgeship.core.model import Model, Source
from edgeship.core.passes import Context, Pass
from edgeship.core.plan import Plan, Step
from edgeship.core.report import StepTime
from edgeship.engine.cache import Cache, Result
from edgeship.engine.chatter import Log, silenced
from edgeship.engine.running import is_of_a_route, run_pass, run_step, told
from edgeship.errors import EdgeshipError


class Progress(Protocol):
    """What a front end hears while steps run."""

    def started(self, step: Step) -> None:
        """A step begins."""

    def moved(self, step: Step, done: int, total: int, what: str) -> None:
        """A step is ``done`` of ``total`` through."""

    def said(self, step: Step, line: str) -> None:
        """A step tells what it is about to do."""

    def finished(self, step: Step, seconds: float, cached: bool) -> None:
        """A step ended well."""

    def failed(self, step: Step) -> None:
        """A step raised; the error follows."""


class Silence:
    """A `Progress` that says nothing."""

    def started(self, step: Step) -> None:
        """Say nothing."""

    def moved(self, step: Step, done: int, total: int, what: str) -> None:
        """Say nothing."""

    def said(self, step: Step, line: str) -> None:
        """Say nothing."""

    def finished(self, step: Step, seconds: float, cached: bool) -> None:
        """Say nothing."""

    def failed(self, step: Step) -> None:
        """Say nothing."""


@dataclass
class Execution:
    """A running plan: results by step index, the time each took, and the errors in which steps ended.

    A step that failed has no result, and neither has what is made of it.
    """

    results: dict[int, Result]
    times: list[StepTime]
    failures: dict[int, Exception] = field(default_factory=dict)

    def refused(self, plan: Plan) -> dict[tuple[str, str], int]:
        """(target, runtime) of every route on which a step failed -> the first such step."""
        found: dict[tuple[str, str], int] = {}
        for index in sorted(self.failures):
            for route in plan.steps[index].routes:
                found.setdefault(route, index)
        return found

    def last_word(self, plan: Plan) -> Exception:
        """The error of a plan of which no route is left: that of its first failed step, and which others failed."""
        first = min(self.failures)
        failure, own = self.failures[first], {runtime for _, runtime in plan.steps[first].routes}
        others = dict.fromkeys(runtime for _, runtime in self.refused(plan) if runtime not in own)
        if not others or not isinstance(failure, EdgeshipError):
            return failure
        whole = type(failure)(f"{failure.what}; {', '.join(others)} failed too (the log says why)", fix=failure.fix)
        whole.__cause__ = failure
        return whole


# What takes everything at the end of a build, or what looks at it.
Gather = Callable[[Step, Execution], Any]


@dataclass(frozen=True)
class Surroundings:
    """What the steps of a plan run with.

    Args:
        gather: called for the steps that take everything (package).
        shared: a folder for what steps leave for each other; None where nothing is to be left.
    """

    source: Source
    cache: Cache
    log: Log
    progress: Progress
    gather: Gather | None = None
    shared: Path | None = None


def execute(
    plan: Plan,
    source: Source,
    cache: Cache,
    log: Log,
    progress: Progress,
    gather: Gather | None = None,
    done: Sequence[tuple[Pass, Result]] = (),
    all_or_nothing: bool = True,
    shared: Path | None = None,
) -> Execution:
    """Run every step of a plan in order.

    Args:
        done: passes that take only the source and have run already in this command, with their results.
        gather: called for the steps that take everything (package), inside the same progress and log.
        all_or_nothing: the first step that fails ends the plan. Otherwise a step that fails takes its own routes with
            it, and the others go on as long as there is one.
        shared: a folder for what steps leave for each other.

    Raises:
        EdgeshipError: whatever a step raised on purpose. OutputError: the disk is full or not writable.
    """
    execution, around = Execution({}, []), Surroundings(source, cache, log, progress, gather, shared)
    routes = {route for step in plan.steps for route in step.routes}
    for step in plan.steps:
        if step.routes and set(step.routes) <= execution.refused(plan).keys():
            continue
        ready = next((result for task, result in done if task == step.task), None)
        if ready is not None:
            execution.results[step.index] = ready
            continue
        progress.started(step)
        begin = time.perf_counter()
        log.line(f"== {step.describe()}")
        try:
            cached = run_here(step, around, execution)
        except BaseException as error:
            progress.failed(step)
            log.line(traceback.format_exc())
            failure = told(error, step.name, cache.root)
            if not all_or_nothing and is_of_a_route(failure):
                assert isinstance(failure, Exception)
                execution.failures[step.index] = failure
                if execution.refused(plan).keys() < routes:
                    continue
                failure = execution.last_word(plan)
            if failure is error:
                raise
            raise failure from error
        seconds = time.perf_counter() - begin
        execution.times.append(StepTime(f"{step.index} {step.name}", seconds, cached))
        progress.finished(step, seconds, cached)
    return execution


def run_here(step: Step, around: Surroundings, execution: Execution) -> bool:
    """Run a step in this process; its result goes into ``execution``. Whether it came from the cache."""
    log, progress = around.log, around.progress
    if type(step.task).shape() == "gather":
        if around.gather is not None:
            with silenced(log):
                around.gather(step, execution)
        return False

    def run(step: Step, inputs: Mapping[str, Model], folder: Path) -> Result:
        context = Context(
            folder,
            lambda done, total, what: progress.moved(step, done, total, what),
            log.line,
            lambda line: progress.said(step, line),
            around.shared,
        )
        return run_pass(step.task, inputs, context, log)

    execution.results[step.index], cached = run_step(step, around.source, around.cache, execution.results, run)
    return cached
