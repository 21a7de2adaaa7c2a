"""Run an order: prepare it, execute its plan, repair what falls short of a gate, publish what holds."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from contextlib import closing
from pathlib import Path

from edgeship.api.orders import BuildOrder
from edgeship.api.preparing import prepare
from edgeship.core.passes import Context
from edgeship.core.plan import Plan, Step
from edgeship.core.report import Report
from edgeship.engine.cache import Cache, default_cache_root, logs_folder
from edgeship.engine.chatter import Log
from edgeship.engine.executor import Execution, Progress, Silence, execute
from edgeship.engine.gathering import Prepared, gather_all
from edgeship.engine.locating import with_places
from edgeship.engine.repair import MAX_ROUNDS, next_attempt
from edgeship.engine.sources import trusted_code
from edgeship.errors import ChangedError

# How often a build starts again when what it reads changes under it.
MAX_TURNS = 3


def run(order: BuildOrder, progress: Progress | None = None, log: Log | None = None) -> Report:
    """Build, check, and publish a bundle.

    Returns:
        The report; `Report.passed` is False, and nothing is published, when a check fell short.

    Raises:
        EdgeshipError: bad input, an unsupported operator, a missing tool, an unwritable output.
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
    prepared = prepare(order, cache, log, progress)
    result: list[Report] = []
    rounds = 0
    while True:
        execution = _attempt(prepared, order, cache, log, progress, result)
        following = None if result[0].passed or rounds == MAX_ROUNDS else next_attempt(prepared, execution, result[0])
        if following is None:
            return result[0] if result[0].passed else with_places(prepared, execution, result[0], log)
        rounds += 1
        # What this build has made is taken up again, whatever the order says of older results.
        prepared, cache = following, dataclasses.replace(cache, read=True)
        log.line(f"== round {rounds}: a gate fell short")


def _attempt(
    prepared: Prepared, order: BuildOrder, cache: Cache, log: Log, progress: Progress, result: list[Report]
) -> Execution:
    """Run a plan; publish when every check holds. The report ends up in ``result``."""

    def gather(step: Step, execution: Execution) -> None:
        gathered = gather_all(prepared, execution, order.bundle, order.source, log)
        result[:] = [gathered.report]
        if gathered.report.passed:
            digests = [cache.digests(model) for model in (prepared.loaded, *(item.artifact for item in gathered.built))]
            gathered = dataclasses.replace(gathered, digests=dict(ChainMap(*digests)))
            step.task.run(gathered, ctx=Context(order.bundle))
            result[:] = [dataclasses.replace(gathered.report, bundle=str(order.bundle))]

    done = [(prepared.load_step.task, prepared.loaded)]
    return execute(prepared.plan, prepared.requests[0].source, cache, log, progress, gather, done)


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
