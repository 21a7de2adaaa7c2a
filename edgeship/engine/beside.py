"""Run a plan with several steps at once: what lowers and checks goes to worker processes, the rest stays here.

Nothing but the time it takes may differ from running the steps in order. A step begins when the steps that it takes
from, and those before it on its routes, have ended; what failed is judged by place in the plan and not by what came
first; and what each step wrote goes into the log in the order of the plan. Steps that time something run alone, at the
end.
"""

from __future__ import annotations

import pickle
import queue
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeship.core.model import Artifact
from edgeship.core.passes import Pass
from edgeship.core.plan import Plan, Step
from edgeship.core.plugins import AUTHOR
from edgeship.core.report import StepTime
from edgeship.engine.cache import Result
from edgeship.engine.chatter import PartLog
from edgeship.engine.executor import Execution, Surroundings, run_here
from edgeship.engine.running import is_of_a_route, run_step, told
from edgeship.engine.workers import LOG, Worker


@dataclass(frozen=True)
class Ended:
    """A step has ended in its worker.

    Args:
        error: what it raised, else None. written: what it wrote to its log.
    """

    step: Step
    worker: Worker
    seconds: float
    result: Result | None = None
    cached: bool = False
    error: BaseException | None = None
    written: bytes = b""


@dataclass(frozen=True)
class Heard:
    """A step in a worker tells something: the name of a function of `Context` and its arguments."""

    step: Step
    function: str
    values: tuple[Any, ...]


class Beside:
    """One run of a plan over several worker processes. See `run`."""

    def __init__(self, plan: Plan, around: Surroundings, all_or_nothing: bool, workers: Iterable[Worker]) -> None:
        self.plan, self.around, self.all_or_nothing = plan, around, all_or_nothing
        self.progress = around.progress
        self.execution = Execution({}, [])
        self.idle = list(workers)
        self.routes = {route for step in plan.steps for route in step.routes}
        self.before = {step.index: _before(step, plan) for step in plan.steps}
        self.waiting = {step.index: step for step in plan.steps}
        self.running: dict[int, Worker] = {}
        self.served: dict[Worker, set[tuple[str, str]]] = {}
        self.events: queue.SimpleQueue[Ended | Heard] = queue.SimpleQueue()
        self.parts: dict[int, bytes] = {}
        self.times: dict[int, StepTime] = {}
        # Errors that end the build, by place: the first of them is raised, once what comes before it has ended.
        self.fatal: dict[int, BaseException] = {}

    def run(self, threads: ThreadPoolExecutor) -> Execution:
        """Run every step. Raises as `executor.execute` does."""
        try:
            while self._start_what_can(threads):
                event = self.events.get()
                if isinstance(event, Heard):
                    self._hear(event)
                else:
                    self._end(event)
        finally:
            self._write_parts(self.plan.steps)
        if self.fatal:
            raise self.fatal[min(self.fatal)]
        self.execution.times = [self.times[index] for index in sorted(self.times)]
        return self.execution

    def take(self, step: Step, result: Result) -> None:
        """A step that has run already in this command."""
        self.execution.results[step.index] = result
        self.waiting.pop(step.index)

    def _start_what_can(self, threads: ThreadPoolExecutor) -> bool:
        """Start and run all that can be; whether anything is left to wait for."""
        while True:
            self._drop_refused()
            self._end_when_all_failed()
            for worker in list(self.idle):
                self._start_next(worker, threads)
            here = [step for step in self._ready() if not _travels(step)]
            if not here:
                return bool(self.running)
            self._run_here(here[0])

    def _ready(self) -> list[Step]:
        """Steps that may begin, in the order of the plan: none behind an error that ends the build."""
        last = min(self.fatal, default=len(self.plan.steps))
        open_steps = self.waiting.keys() | self.running.keys()
        return [
            step
            for index, step in sorted(self.waiting.items())
            if index < last and self.before[index].isdisjoint(open_steps) and not (_is_alone(step) and self._busy(last))
        ]

    def _busy(self, last: int) -> bool:
        """Whether something that is no timing runs, or is still to run before ``last``: a step that times waits."""
        return bool(self.running) or any(not _is_alone(other) for other in self.waiting.values() if other.index < last)

    def _drop_refused(self) -> None:
        refused = self.execution.refused(self.plan).keys()
        for index, step in list(self.waiting.items()):
            if step.routes and set(step.routes) <= refused:
                del self.waiting[index]

    def _end_when_all_failed(self) -> None:
        failures = self.execution.failures
        if failures and not self.running and not self.fatal and self.execution.refused(self.plan).keys() >= self.routes:
            self.fatal[min(failures)] = self.execution.last_word(self.plan)

    def _start_next(self, worker: Worker, threads: ThreadPoolExecutor) -> None:
        """Start what is best for a worker, where anything is ready: checks of what it lowered, which are warm there and
        free memory; then what it has imported the libraries for; then what most waits for."""
        served = self.served.setdefault(worker, set())

        def order(step: Step) -> tuple[bool, bool, int, int]:
            runtimes = {runtime for _, runtime in step.routes}
            return (
                served.isdisjoint(step.routes), runtimes.isdisjoint(worker.runtimes), -self._followers(step), step.index
            )  # fmt: skip

        step = min(filter(_travels, self._ready()), key=order, default=None)
        if step is not None:
            self._begin(step)
            self.idle.remove(worker)
            self.running[step.index] = worker
            served.update(step.routes)
            threads.submit(self._run_in, worker, step)

    def _followers(self, step: Step) -> int:
        """How many steps wait on the routes of one."""
        return sum(not set(step.routes).isdisjoint(other.routes) for other in self.waiting.values())

    def _begin(self, step: Step) -> None:
        del self.waiting[step.index]
        self.progress.started(step)
        self.parts[step.index] = f"== {step.describe()}\n".encode()

    def _run_in(self, worker: Worker, step: Step) -> None:
        """In a thread: run a step in a worker, and tell how it ended."""
        begin = time.perf_counter()
        written = bytearray()

        def hear(function: str, values: tuple[Any, ...]) -> None:
            self.events.put(Heard(step, function, values))

        def run(step: Step, inputs: Any, folder: Path) -> Result:
            try:
                answer = worker.run(
                    step,
                    inputs,
                    folder,
                    self.around.shared,
                    lambda name, said: self.events.put(Heard(step, name, said)),
                )
            finally:
                with suppress(OSError):
                    written.extend((folder.parent / LOG).read_bytes())
            if answer.error is None:
                made: Result = answer.result
                return made
            with suppress(AttributeError):
                setattr(answer.error, AUTHOR, answer.author)
            raise answer.error

        try:
            result, cached = run_step(step, self.around.source, self.around.cache, self.execution.results, run)
        except BaseException as error:
            if not written:
                written.extend(traceback.format_exc().encode(errors="replace"))
            ended = Ended(step, worker, time.perf_counter() - begin, error=error, written=bytes(written))
        else:
            ended = Ended(step, worker, time.perf_counter() - begin, result, cached, written=bytes(written))
        self.events.put(ended)

    def _hear(self, event: Heard) -> None:
        if event.step.index not in self.running:
            return
        if event.function == "say":
            self.progress.said(event.step, *event.values)
        else:
            self.progress.moved(event.step, *event.values)

    def _end(self, event: Ended) -> None:
        """A step ended in a worker."""
        del self.running[event.step.index]
        # It may have been stopped for what it ran; steps that come before an error still want it.
        event.worker.renew()
        self.idle.append(event.worker)
        self.parts[event.step.index] += event.written
        if event.error is not None:
            self._fail(event.step, event.error)
        elif event.result is not None:
            self.execution.results[event.step.index] = event.result
            self._finish(event.step, event.seconds, event.cached)

    def _run_here(self, step: Step) -> None:
        """Run a step in this process, which nothing else does meanwhile."""
        self._begin(step)
        begin = time.perf_counter()
        part, cached = PartLog(), False
        try:
            # The report of a build says what the steps took.
            self.execution.times = [self.times[index] for index in sorted(self.times)]
            cached = run_here(step, replace(self.around, log=part), self.execution)
        except BaseException as error:
            part.line(traceback.format_exc())
            self.parts[step.index] += part.taken()
            self._fail(step, error)
            if not isinstance(error, Exception):
                raise
        else:
            self.parts[step.index] += part.taken()
            self._finish(step, time.perf_counter() - begin, cached)

    def _finish(self, step: Step, seconds: float, cached: bool) -> None:
        self.times[step.index] = StepTime(f"{step.index} {step.name}", seconds, cached)
        self.progress.finished(step, seconds, cached)
        # What can no longer come before it is in the log at once.
        open_steps = self.waiting.keys() | self.running.keys()
        first = min((index for index in open_steps), default=len(self.plan.steps))
        self._write_parts(self.plan.steps[:first])

    def _fail(self, step: Step, error: BaseException) -> None:
        """A failed step takes its routes with it, or ends the build; what comes before it in the plan goes on."""
        self.progress.failed(step)
        failure = told(error, step.name, self.around.cache.root)
        if failure is not error:
            failure.__cause__ = error
        if not self.all_or_nothing and is_of_a_route(failure):
            assert isinstance(failure, Exception)
            self.execution.failures[step.index] = failure
            return
        self.fatal[step.index] = failure
        for index, worker in self.running.items():
            if index > min(self.fatal):
                worker.stop()

    def _write_parts(self, steps: Iterable[Step]) -> None:
        """Write what steps wrote into the log, in the order of the plan."""
        for step in steps:
            self.around.log.write(self.parts.pop(step.index, b""))


def _before(step: Step, plan: Plan) -> set[int]:
    """Steps that must have ended: those that it takes from, and those before it on its routes that are no timings."""
    mine, last = set(step.routes), _is_alone(step)
    earlier = {
        other.index
        for other in plan.steps[: step.index]
        if not mine.isdisjoint(other.routes) and (last or not _is_alone(other))
    }
    return {*earlier, *(index for index in step.inputs.values() if index >= 0)}


def _travels(step: Step) -> bool:
    """Whether a step can run in another process: it lowers or checks, from results alone, and its class can be found
    there."""
    shape, made = type(step.task).shape(), step.task.edges()[1]
    lowers = shape in ("bridge", "refinement") and isinstance(made, type) and issubclass(made, Artifact)
    if not (lowers or shape == "check") or min(step.inputs.values(), default=-1) < 0:
        return False
    if type(step.task).__module__ == "__main__":
        return False
    try:
        pickle.dumps(step.task)
    except Exception:  # whatever its fields raise
        return False
    return True


def _is_alone(step: Step) -> bool:
    """Whether nothing else may run beside a step: it takes time, or everything."""
    return type(step.task).shape() in ("measure", "gather")


def run_beside(
    plan: Plan,
    around: Surroundings,
    done: Iterable[tuple[Pass, Result]],
    workers: list[Worker],
    all_or_nothing: bool = True,
) -> Execution:
    """Run a plan with as many steps at once as there are workers. Arguments and errors as of `executor.execute`.

    Whatever ends it, no step runs any more when it returns.
    """
    run = Beside(plan, around, all_or_nothing, workers)
    for step in plan.steps:
        ready = next((result for task, result in done if task == step.task), None)
        if ready is not None:
            run.take(step, ready)
    threads = ThreadPoolExecutor(len(workers))
    try:
        return run.run(threads)
    finally:
        for worker in run.running.values():
            worker.stop()
        threads.shutdown(wait=True)
