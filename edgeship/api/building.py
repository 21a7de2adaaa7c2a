"""Run an order: prepare it, execute its plan, repair what falls short of a gate, publish what holds."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from contextlib import closing
from pathlib import Path

from edgeship.api.orders import BuildOrder
from edgeship.api.preparing import prepare
from edgeship.core.artifact import Gathered
from edgeship.core.passes import Context
from edgeship.core.plan import Plan, Step
from edgeship.core.registry import targets
from edgeship.core.report import Report
from edgeship.engine.beside import run_beside
from edgeship.engine.cache import Cache, default_cache_root, logs_folder
from edgeship.engine.chatter import Log
from edgeship.engine.executor import Execution, Progress, Silence, Surroundings, execute
from edgeship.engine.gathering import Prepared, gather_all, publishable
from edgeship.engine.locating import with_places
from edgeship.engine.repair import MAX_ROUNDS, next_attempt
from edgeship.engine.room import cores, jobs_for, wanted_jobs
from edgeship.engine.sources import trusted_code
from edgeship.engine.workers import Crew, Worker
from edgeship.errors import ChangedError

# How often a build starts again when what it reads changes under it.
MAX_TURNS = 3


def run(order: BuildOrder, progress: Progress | None = None, log: Log | None = None) -> Report:
    """Build, check, and publish a bundle.

    What one runtime cannot take, or does not answer rightly, is a line of the report; the other artifacts are published
    all the same, unless the order is all or nothing or a limit that the user set is not kept.

    Returns:
        The report; `Report.passed` is False when an artifact is missing or a check fell short, and `Report.bundle` is
        empty when nothing was published.

    Raises:
        EdgeshipError: bad input, an unwritable output; no runtime took the model: the reason of the first.
    """
    from edgeship.shipping.bundle import check_output
    from edgeship.shipping.replacing import remove_leftovers

    root = default_cache_root()
    check_output(order.bundle, root, order.named_file)
    log = log or Log(log_path(order.bundle))
    progress = progress or Silence()
    with closing(Cache(root)) as cache:
        cache.sweep()
    remove_leftovers(order.bundle.resolve())
    for turn in range(MAX_TURNS):
        try:
            with closing(Cache(root, order.use_cache)) as cache:
                return _build(order, cache, log, progress)
        except ChangedError as error:
            if turn == MAX_TURNS - 1:
                raise
            log.line(f"== once more: {error.what}")
    raise AssertionError


def _build(order: BuildOrder, cache: Cache, log: Log, progress: Progress) -> Report:
    with _crew(order) as crew:
        prepared = prepare(order, cache, log, progress, crew.warm)
        workers = crew.keep(_jobs(order, prepared))
        rounds, shared = 0, cache.common()
        while True:
            report, following = _attempt(
                prepared, order, cache, log, progress, shared, workers, last=rounds == MAX_ROUNDS
            )
            if following is None:
                return report
            rounds += 1
            # What this build has made is taken up again, whatever the order says of older results.
            prepared, cache = following, dataclasses.replace(cache, read=True)
            log.line(f"== round {rounds}: a gate fell short")


def _crew(order: BuildOrder) -> Crew:
    """As many workers as an order may have; how many it has room for is known when its model is."""
    names = order.runtimes or {name for target in order.targets if target in targets() for name in _runs(target)}
    size = wanted_jobs(order.jobs, max(1, len(names)))
    return Crew(size if size > 1 else 0, cores())


def _runs(target: str) -> tuple[str, ...]:
    return targets()[target].runtime_names


def _jobs(order: BuildOrder, prepared: Prepared) -> int:
    """How many artifacts are made at once."""
    inventory = prepared.requests[0].inventory
    assert inventory is not None
    return jobs_for(order.jobs, inventory, len({request.runtime for request in prepared.requests}))


def _attempt(
    prepared: Prepared,
    order: BuildOrder,
    cache: Cache,
    log: Log,
    progress: Progress,
    shared: Path,
    workers: list[Worker],
    *,
    last: bool,
) -> tuple[Report, Prepared | None]:
    """Run a plan. Returns its report and what to try next; where there is nothing, what holds is published.

    Args:
        shared: a folder for what steps leave for each other. last: nothing is tried any more.
        workers: processes for what can run at once; without any, all runs here.
    """
    ends: list[tuple[Report, Prepared | None]] = []

    def gather(step: Step, execution: Execution) -> None:
        gathered = gather_all(prepared, execution, order.bundle, order.source, log)
        report = gathered.report
        following = None if report.passed or last else next_attempt(prepared, execution, report)
        if following is None:
            if not report.passed:
                report = with_places(prepared, execution, report, log)
            report = _published(step, prepared, dataclasses.replace(gathered, report=report), cache)
        ends.append((report, following))

    done = [(prepared.load_step.task, prepared.loaded)]
    plan, source, whole = prepared.plan, prepared.requests[0].source, prepared.all_or_nothing
    if workers:
        run_beside(plan, Surroundings(source, cache, log, progress, gather, shared), done, workers, whole)
    else:
        execute(plan, source, cache, log, progress, gather, done, whole, shared)
    return ends[-1]


def _published(step: Step, prepared: Prepared, gathered: Gathered, cache: Cache) -> Report:
    """Write the bundle of the artifacts that may ship; the report says where, or nothing where there is none."""
    kept = {(row.runtime, row.target) for row in publishable(prepared, gathered.report)}
    built = tuple(item for item in gathered.built if (item.artifact.runtime, ",".join(item.targets)) in kept)
    if not built:
        return gathered.report
    models = [prepared.loaded, *(item.artifact for item in built)]
    digests = [cache.digests(model) for model in models]
    shipped = dataclasses.replace(gathered, built=built, digests=dict(ChainMap(*digests)))
    step.task.run(shipped, ctx=Context(gathered.output))
    return dataclasses.replace(gathered.report, bundle=str(gathered.output))


def plan_order(order: BuildOrder, log: Log | None = None, progress: Progress | None = None) -> Plan:
    """The plan that `run` would run. The source is loaded (or taken from the cache), nothing is converted."""
    with closing(Cache(default_cache_root(), order.use_cache)) as cache:
        return prepare(order, cache, log or side_log(), progress or Silence()).plan


def trusted(order: BuildOrder) -> list[str]:
    """What an order with ``trust`` lets run, one line each; nothing is run to find out."""
    return trusted_code(order.source) if order.trust and order.model is None else []


def log_path(bundle: Path) -> Path:
    """The log file beside a bundle."""
    return bundle.parent / f"{bundle.name}.log"


def side_log() -> Log:
    """The log of commands that write no bundle: in the cache, so that the log of a build stays what it was."""
    return Log(logs_folder() / "last.log")
