"""From a plan to results: run each step or take it from the cache, check its promise, tell how long it took."""

from __future__ import annotations

import errno
import os
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from edgeship.core.model import Model, Source
from edgeship.core.passes import Context, Pass
from edgeship.core.plan import Plan, Step
from edgeship.core.report import StepTime
from edgeship.engine.cache import Cache, Result, result_kinds
from edgeship.engine.chatter import Log, silenced
from edgeship.engine.outside import Outside
from edgeship.errors import ChangedError, DataError, EdgeshipError, OutputError, UsageError, meaning_of

# A disk with less than this is full: no artifact fits.
FULL_BYTES = 1 << 20


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


def execute(
    plan: Plan,
    source: Source,
    cache: Cache,
    log: Log,
    progress: Progress,
    gather: Callable[[Step, Execution], Any] | None = None,
    done: Sequence[tuple[Pass, Result]] = (),
    all_or_nothing: bool = True,
) -> Execution:
    """Run every step of a plan in order.

    Args:
        done: passes that take only the source and have run already in this command, with their results.
        gather: called for the steps that take everything (package), inside the same progress and log.
        all_or_nothing: the first step that fails ends the plan. Otherwise a step that fails takes its own routes with
            it, and the others go on as long as there is one.

    Raises:
        EdgeshipError: whatever a step raised on purpose. OutputError: the disk is full or not writable.
    """
    execution = Execution({}, [])
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
            if type(step.task).shape() == "gather":
                cached = False
                if gather is not None:
                    with silenced(log):
                        gather(step, execution)
            else:
                cached = _run_step(step, source, cache, log, progress, execution)
        except BaseException as error:
            progress.failed(step)
            log.line(traceback.format_exc())
            told = _told(error, step, cache)
            failure = error if told is None else told
            if not all_or_nothing and _is_of_a_route(failure):
                assert isinstance(failure, Exception)
                execution.failures[step.index] = failure
                if execution.refused(plan).keys() < routes:
                    continue
                failure = next(iter(execution.failures.values()))
            if failure is error:
                raise
            raise failure from error
        seconds = time.perf_counter() - begin
        execution.times.append(StepTime(f"{step.index} {step.name}", seconds, cached))
        progress.finished(step, seconds, cached)
    return execution


def _is_of_a_route(failure: BaseException) -> bool:
    """Whether another route may go on: not after Ctrl-C, a wrong order, data that do not fit, or a full disk."""
    of_the_order = (UsageError, DataError, ChangedError, OutputError)
    return isinstance(failure, Exception) and not isinstance(failure, of_the_order)


def _run_step(step: Step, source: Source, cache: Cache, log: Log, progress: Progress, execution: Execution) -> bool:
    inputs = {name: _input(index, source, execution.results) for name, index in step.inputs.items()}
    key = cache.key(step.task, {name: model.digest for name, model in inputs.items()})
    if step.task.cached:
        found = cache.get(key)
        if found is not None:
            execution.results[step.index] = found
            return True
    outside = Outside(step.task, inputs)
    outside.begin()
    folder = cache.scratch(key)
    context = Context(
        folder,
        lambda done, total, what: progress.moved(step, done, total, what),
        log.line,
        lambda line: progress.said(step, line),
    )
    try:
        with silenced(log):
            result = step.task.run(**inputs, ctx=context)
            step.task.ensures(result, **inputs)
        if result_kinds().get(type(result).kind) is not type(result):
            raise TypeError(f"{step.name} made a {type(result).__name__}, which is not something a pass can make")
        # Only what was read as it was named goes in under that name.
        outside.end()
        for model in inputs.values():
            cache.check(model)
        execution.results[step.index] = cache.put(key, folder, result)
    except (EdgeshipError, OSError):
        raise
    except Exception as error:
        # Libraries that write in C++ or Rust have errors of their own for a full disk.
        if "No space left" in str(error) or _is_full(cache):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(cache.root)) from error
        raise
    finally:
        cache.discard(folder)
    return False


def _input(index: int, source: Source, results: Mapping[int, Result]) -> Model:
    if index < 0:
        return source
    result = results[index]
    assert isinstance(result, Model), "only models flow between steps"
    return result


def _is_full(cache: Cache) -> bool:
    try:
        return shutil.disk_usage(cache.root).free < FULL_BYTES
    except OSError:
        return False


def _told(error: BaseException, step: Step, cache: Cache) -> EdgeshipError | None:
    """What a failure of a step means where the machine is the reason; None when the error stands as it is."""
    if isinstance(error, EdgeshipError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return _disk_error(error, cache)
    limit = meaning_of(error)
    return None if limit is None else type(limit)(f"{step.name}: {limit.what}", fix=limit.fix)


def _disk_error(error: OSError, cache: Cache) -> EdgeshipError:
    place = error.filename2 or error.filename or cache.root
    if error.errno == errno.ENOSPC:
        return OutputError(f"no space left on the disk of {place}", fix="free some, or set EDGESHIP_CACHE elsewhere")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{place} cannot be written: {error.strerror}", fix="choose another -o or EDGESHIP_CACHE")
    return OutputError(f"{place}: {error.strerror or error}", fix="see the log file")
