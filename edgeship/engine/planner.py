"""From requests to a plan: bridges make the route, refinements ride on it, checks and measures end it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from edgeship.core.model import Artifact, Model, Source, TorchModel
from edgeship.core.passes import Pass, Skip
from edgeship.core.plan import Plan, Step, made_name
from edgeship.core.profile import Request
from edgeship.core.records import from_plain, to_plain
from edgeship.core.registry import find, passes, runtimes
from edgeship.core.report import Refusal
from edgeship.core.settings import typed_value
from edgeship.errors import (
    BUG,
    EdgeshipError,
    EncodingError,
    LoweringError,
    MissingToolError,
    NoRouteError,
    UnsupportedOpError,
    UsageError,
)


def plan_load(request: Request) -> Plan:
    """Only the way from the source to a TorchModel: what must run before the rest can be planned."""
    builder = _Builder()
    builder.route(request, TorchModel, ends=False)
    return builder.plan()


def plan_build(requests: Sequence[Request], *, all_or_nothing: bool = False) -> Plan:
    """The whole plan for several (target, runtime) routes; steps that are equal are shared.

    A route that its runtime cannot take is listed in `Plan.refused`, as long as another one is left.

    Args:
        all_or_nothing: such a route is an error.

    Raises:
        UsageError: an option that is wrong, or for a pass that is not in the plan.
        EdgeshipError: the reason of the first route, when no route is left.
    """
    builder = _Builder()
    planned: list[Request] = []
    errors: list[EdgeshipError] = []
    for request in requests:
        before = builder.state()
        try:
            builder.route(request, runtimes()[request.runtime].artifact, ends=True)
            planned.append(request)
        except OF_A_ROUTE as error:
            if all_or_nothing:
                raise
            errors.append(error)
            builder.restore(before)
            builder.refused.append(refusal_of(error, request.target.name, request.runtime))
    if not planned:
        raise errors[0]
    builder.finish(planned[0])
    plan = builder.plan()
    _refuse_idle_options(plan, requests[0].options)
    return plan


# Errors that say what one runtime cannot do; all others are of the order as a whole.
OF_A_ROUTE = (NoRouteError, EncodingError, MissingToolError, UnsupportedOpError, LoweringError)


def refusal_of(error: Exception, target: str, runtime: str, step: str = "") -> Refusal:
    """An error as the line of a report."""
    if isinstance(error, EdgeshipError):
        return Refusal(target, runtime, step, error.what, error.fix, error.exit_code)
    reason = f"a fault in edgeship: {type(error).__name__}: {error}"
    return Refusal(target, runtime, step, " ".join(reason.split())[:300], "see the log file", BUG)


class _Builder:
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.skipped: dict[str, dict[tuple[str, str], str]] = {}
        self.refused: list[Refusal] = []

    def state(self) -> tuple[list[Step], dict[str, dict[tuple[str, str], str]]]:
        """What `restore` goes back to."""
        return list(self.steps), {name: dict(why) for name, why in self.skipped.items()}

    def restore(self, state: tuple[list[Step], dict[str, dict[tuple[str, str], str]]]) -> None:
        """Take back a route that ended half way."""
        self.steps, self.skipped = state

    def plan(self) -> Plan:
        used = {step.name for step in self.steps}
        skipped = {name: _told(why) for name, why in self.skipped.items() if name not in used}
        return Plan(tuple(self.steps), skipped, tuple(self.refused))

    def skip(self, name: str, skip: Skip, request: Request) -> None:
        """Keep why a pass is not on a route."""
        self.skipped.setdefault(name, {})[request.target.name, request.runtime] = skip.reason

    def route(self, request: Request, goal: type[Model], *, ends: bool) -> None:
        """Add the steps of one route, from the source to ``goal`` and through its checks."""
        newest: dict[type[Model], int] = {Source: -1}
        first_torch: int | None = None
        for bridge in self._bridges(request, goal):
            made = bridge.edges()[1]
            newest[made] = self._add(bridge, request, newest, first_torch)
            if made is TorchModel:
                first_torch = newest[made]
            for refinement in self._refinements(request, made) if ends else ():
                newest[made] = self._add(refinement, request, newest, first_torch)
        if ends:
            for name, cls in passes().items():
                if cls.shape() in ("check", "measure"):
                    task = self._configure(cls, request)
                    if isinstance(task, Skip):
                        self.skip(name, task, request)
                    else:
                        self._add(task, request, newest, first_torch)

    def finish(self, request: Request) -> None:
        """Add the gather passes, which take everything."""
        for name, cls in passes().items():
            if cls.shape() == "gather":
                task = self._configure(cls, request)
                if isinstance(task, Skip):
                    self.skip(name, task, request)
                    continue
                inputs = {
                    f"{step.name}:{step.index}": step.index for step in self.steps if step.name.startswith("lower/")
                }
                routes = tuple(dict.fromkeys(route for step in self.steps for route in step.routes))
                self.steps.append(Step(len(self.steps), task, inputs, made_name(cls.edges()[1]), routes))

    def _bridges(self, request: Request, goal: type[Model]) -> list[Pass]:
        """The shortest chain of willing bridges from the source to ``goal``."""
        ready: list[Pass] = []
        for name, cls in passes().items():
            if cls.shape() == "bridge":
                task = self._configure(cls, request)
                if isinstance(task, Skip):
                    self.skip(name, task, request)
                else:
                    ready.append(task)
        paths: list[tuple[type[Model], list[Pass]]] = [(Source, [])]
        seen: set[type[Model]] = {Source}
        while paths:
            kind, path = paths.pop(0)
            if kind is goal:
                return path
            for task in ready:
                inputs, made = task.edges()
                if inputs.get("model") is kind and made not in seen:
                    seen.add(made)
                    paths.append((made, [*path, task]))
        route = (request.target.name, request.runtime)
        mine = {name: why[route] for name, why in self.skipped.items() if route in why}
        reasons = [f"{name}: {why}" for name, why in mine.items() if name.split("/")[0] in ("load", "lower")]
        what = f"there is no way from {request.source.reference} to {goal.kind}"
        raise NoRouteError(f"{what} for {request.runtime} on {request.target.name}", fix="; ".join(reasons))

    def _refinements(self, request: Request, kind: type[Model]) -> list[Pass]:
        tasks: list[Pass] = []
        for name, cls in passes().items():
            if cls.shape() == "refinement" and cls.edges()[0].get("model") is kind:
                task = self._configure(cls, request)
                if isinstance(task, Skip):
                    self.skip(name, task, request)
                else:
                    tasks.append(task)
        return _in_order(tasks)

    def _configure(self, cls: type[Pass], request: Request) -> Pass | Skip:
        try:
            task = cls.plan(request)
        except EdgeshipError:
            raise
        except Exception as error:
            if cls.__module__.startswith("edgeship."):
                raise
            return Skip(f"its plug-in failed: {type(error).__name__}: {error}")
        if isinstance(task, Skip):
            return task
        given = request.options.get(cls.name, {})
        if given:
            task = apply_options(task, given)
        task.confirm(request)
        return task

    def _add(self, task: Pass, request: Request, newest: Mapping[type[Model], int], first_torch: int | None) -> int:
        inputs = {}
        for name, kind in task.edges()[0].items():
            if name == "original":
                inputs[name] = first_torch if first_torch is not None else -1
            elif kind is Artifact:
                inputs[name] = newest[runtimes()[request.runtime].artifact]
            else:
                inputs[name] = newest[kind]
        route = (request.target.name, request.runtime)
        for index, step in enumerate(self.steps):
            if step.task == task and step.inputs == inputs:
                if route not in step.routes:
                    self.steps[index] = dataclasses.replace(step, routes=(*step.routes, route))
                return index
        step = Step(len(self.steps), task, inputs, made_name(task.edges()[1]), (route,))
        self.steps.append(step)
        return step.index


def _told(reasons: Mapping[tuple[str, str], str]) -> str:
    """Why a pass is skipped: by runtime where that differs, and by target where a runtime has two reasons."""
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    by_runtime: dict[str, set[str]] = {}
    for (_, runtime), reason in reasons.items():
        by_runtime.setdefault(runtime, set()).add(reason)
    routes: dict[str, dict[str, None]] = {}
    for (target, runtime), reason in reasons.items():
        route = runtime if len(by_runtime[runtime]) == 1 else f"{runtime} on {target}"
        routes.setdefault(reason, {})[route] = None
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in routes.items())


def _in_order(tasks: list[Pass]) -> list[Pass]:
    """Refinements with those they come ``after`` first, and those they come ``before`` last; otherwise by name."""
    waiting = sorted(tasks, key=lambda task: task.name)
    first = {task.name: {*task.after} for task in tasks}
    for task in tasks:
        for name in task.before:
            first.setdefault(name, set()).add(task.name)
    done: list[Pass] = []
    while waiting:
        left = {task.name for task in waiting}
        ready = [task for task in waiting if left.isdisjoint(first[task.name])]
        if not ready:
            raise UsageError(f"passes wait for each other: {', '.join(task.name for task in waiting)}")
        done.append(ready[0])
        waiting.remove(ready[0])
    return done


def apply_options(task: Pass, given: Mapping[str, Any]) -> Pass:
    """A pass with fields replaced by what the user gave. An unknown field suggests the nearest."""
    plain = dict(to_plain(task))
    plain |= {name: typed_value(type(task), name, value) for name, value in given.items()}
    try:
        return from_plain(type(task), plain, task.name)
    except UsageError as error:
        raise UsageError(error.what, fix=error.fix or "see its options in edgeship passes") from None


def _refuse_idle_options(plan: Plan, options: Mapping[str, Mapping[str, Any]]) -> None:
    used = {step.name for step in plan.steps}
    for name in options:
        find("pass", passes(), name)
        if name not in used:
            why = plan.skipped.get(name, "it is not on this route")
            raise UsageError(f"--set {name} has no effect: {why}", fix="leave it out, or choose another profile")
