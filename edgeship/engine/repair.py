"""When a gate falls short: which layers get bits back, and where the budget shrinks.

The accuracy gate measures the artifact. When the metric drops too far, layers are ranked by what each costs the outputs
alone (`edgeship.passes.check.layers`), and the worst get the next larger encoding that the runtime holds, until what is
left costs half of what it did; then the route is built again. NNCF and HAWQ rank alike. The loop ends when the gate
holds or nothing is left to give back. With profile ``auto`` a file over its limit shrinks the budget by the excess.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from edgeship.core.encodings import encoding_named, fitted, short_name
from edgeship.core.inventory import WeightUse
from edgeship.core.model import TorchModel
from edgeship.core.planning import refusal
from edgeship.core.profile import Request
from edgeship.core.registry import runtimes
from edgeship.core.report import ArtifactRow, Report
from edgeship.core.weights import Encoding
from edgeship.engine.executor import Execution
from edgeship.engine.gathering import Prepared, refusals
from edgeship.engine.notes import losses_of
from edgeship.engine.planner import plan_build

MAX_ROUNDS = 10
# Noise over signal at the outputs below which the stored numbers are not what costs the metric (60 dB).
NEGLIGIBLE = 1e-6


def next_attempt(prepared: Prepared, execution: Execution, report: Report) -> Prepared | None:
    """The same build with more bits or a smaller budget where a gate fell short; None when that cannot help."""
    refused = execution.refused(prepared.plan)
    requests = [item for item in prepared.requests if (item.target.name, item.runtime) not in refused]
    changed = False
    for row in report.rows:
        failed = {verdict.check for verdict in row.verdicts if not verdict.passed}
        if not failed:
            continue
        mine = [index for index, request in enumerate(requests) if _is_of(request, row)]
        for index in mine:
            repairable = failed <= {"check/accuracy", "check/size"}
            wanted = _changed(requests[index], row, failed, prepared, execution) if repairable else None
            if wanted is None:
                if _holds_all_back(prepared, row):
                    return None
                continue
            changed |= wanted != requests[index]
            requests[index] = wanted
    if not changed:
        return None
    plan = plan_build(requests, all_or_nothing=prepared.all_or_nothing)
    known = (*prepared.plan.refused, *refusals(prepared.plan, execution), *plan.refused)
    return dataclasses.replace(prepared, plan=dataclasses.replace(plan, refused=known), requests=tuple(requests))


def _holds_all_back(prepared: Prepared, row: ArtifactRow) -> bool:
    """Whether nothing ships as long as this artifact falls short: then no other is worth another round."""
    failed = [verdict for verdict in row.verdicts if not verdict.passed]
    return prepared.all_or_nothing or any(item.check in prepared.gates or item.by_hand for item in failed)


def _is_of(request: Request, row: ArtifactRow) -> bool:
    return request.runtime == row.runtime and request.target.name in row.target.split(",")


def _changed(
    request: Request, row: ArtifactRow, failed: set[str], prepared: Prepared, execution: Execution
) -> Request | None:
    if "check/size" in failed:
        # Bits given back take bytes: with both gates short, or another profile, there is nothing to trade.
        if request.choice.weights != "auto" or "check/accuracy" in failed or request.raised:
            return None
        return dataclasses.replace(request, spare_bytes=request.spare_bytes + _excess(request, row))
    if request.choice.weights in ("float16", "float32"):
        return None
    losses = losses_of(row)
    if not losses:
        return None if request.rank else dataclasses.replace(request, rank=True)
    encodings = _encodings(request, prepared, execution)
    raised = raise_worst(request, losses, encodings)
    return dataclasses.replace(request, raised=tuple(sorted(raised.items()))) if raised else None


def _excess(request: Request, row: ArtifactRow) -> int:
    """Bytes over the limit, and a little more, so that the loop ends."""
    limit = int(request.target.app_memory_bytes.value)
    over = max(0, row.memory_bytes - limit)
    if request.max_size_bytes is not None:
        over = max(over, row.size_bytes - request.max_size_bytes)
    return over + over // 50 + 64


def raise_worst(
    request: Request, losses: Mapping[str, float], encodings: Mapping[str, Encoding]
) -> dict[str, str] | None:
    """``request.raised`` with the next encoding for the layers that cost most, until half of the loss is gone.

    None when no layer can be raised any further.
    """
    assert request.inventory is not None
    uses = {use.name: use for use in request.inventory.weights}
    raised = dict(request.raised)
    kept = dict(request.keep)
    open_losses = {name: loss for name, loss in losses.items() if name in encodings and name not in kept}
    total, gone, moved = sum(open_losses.values()), 0.0, False
    if total < NEGLIGIBLE:
        return None
    for name in sorted(open_losses, key=lambda item: (-open_losses[item], item)):
        larger = larger_encoding(request, uses[name], encodings[name])
        if larger is None:
            continue
        raised[name], moved = short_name(larger), True
        gone += open_losses[name]
        if gone >= total / 2:
            break
    return raised if moved else None


def larger_encoding(request: Request, use: WeightUse, encoding: Encoding) -> Encoding | None:
    """The next encoding with more bits that the runtime holds for a weight: of the same family, then int8, float16."""
    inner = encoding.dense
    larger = [*inner.wider, *(encoding_named(text) for text in ("int8", "float16"))]
    runtime = runtimes()[request.runtime]
    width = runtime.container_bits(use.op, inner)
    found: Encoding | None = None
    for candidate in (fitted(item, use) for item in larger):
        room = runtime.container_bits(use.op, candidate)
        # Of those that take the same bytes, the last: 4 bits, not 3 in a container of 4.
        fits = room > width if found is None else room == runtime.container_bits(use.op, found)
        if candidate.bits > inner.bits and fits and not refusal(request, use.op, candidate):
            found = candidate
    return found


def _encodings(request: Request, prepared: Prepared, execution: Execution) -> dict[str, Encoding]:
    """What was decided for each weight on this route."""
    from edgeship.program.program import read_record

    route = (request.target.name, request.runtime)
    for step in prepared.plan.steps:
        if step.name == "compress/quantize" and route in step.routes:
            result = execution.results[step.index]
            assert isinstance(result, TorchModel)
            return dict(read_record(result).encodings)
    return {}
