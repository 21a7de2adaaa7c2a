"""Sentences under the table of a report: why a runtime got its encodings, what the gates changed, what zeros gained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from edgeship.core.encodings import encoding_named
from edgeship.core.encodings.mxfp4 import BLOCK
from edgeship.core.forms import STATIC_MODES
from edgeship.core.planning import planned_encoding
from edgeship.core.profile import Request
from edgeship.core.registry import runtimes
from edgeship.core.report import LOSS_OF, ArtifactRow
from edgeship.core.speed import predicted, slower
from edgeship.core.units import counted, human_bytes
from edgeship.core.weights import MXFP4, Affine
from edgeship.program.program import REMARK, ProgramRecord

SHOWN = 5
# From which share of the arithmetic on unpacking weights is worth a word.
UNPACKED_SHARE = 0.1


def notes_of(
    requests: Sequence[Request], rows: Sequence[ArtifactRow], records: Sequence[ProgramRecord]
) -> tuple[str, ...]:
    """All sentences, each once.

    Args:
        records: what was decided for each row.
    """
    found: list[str] = []
    for request in requests:
        why = request.profile.why.get(request.runtime)
        changed = _quickest(request) or _unseen(request)
        if changed:
            found.append(changed)
        elif why:
            found.append(f"{request.runtime}: {why}")
        found += _slower(request)
    for row, record in zip(rows, records, strict=True):
        found += [entry.removeprefix(REMARK) for entry in record.history if entry.startswith(REMARK)]
        found += [_zeros(row, record)] if record.pruned else []
        found += [_curve(row, record)] if record.curve else []
        found += _ungrouped(requests, row, record)
        found += _widened(row, record)
        found += _unpacked(requests, row, record)
        found += [_ranking(row)] if losses_of(row) and not row.passed else []
        found += [_pruning(row, record)] if record.pruned and not row.passed else []
    found += [_given_back(request) for request in requests if request.raised]
    found += [_budget(request) for request in requests if request.spare_bytes]
    return tuple(dict.fromkeys(found))


def _unseen(request: Request) -> str:
    """Why activations are not static though the profile wants them so; empty when they are."""
    format = runtimes()[request.runtime].format
    wanted, got = request.profile.choice(request.runtime, format.name), request.choice
    # Of a source that says it itself there is nothing to tell where the profile wants no static ones.
    if wanted.activations == got.activations or wanted.activations not in STATIC_MODES:
        return ""
    head, way_out = f"{request.runtime}: no data say what inputs look like", "give --calibration DATA"
    bits = wanted.activations.removeprefix("int")
    if wanted.weights != got.weights:
        return (
            f"{head}, and no range is known of {_some(request.unbounded)}: a static grid loses what is small beside "
            f"its step, so weights and activations are float16; with data weights have 8 bits and activations {bits}: "
            f"{way_out}"
        )
    form = "are quantized while running" if got.activations == "dynamic" else f"are {got.activations}"
    return (
        f"{head}, so activations {form}; profile {request.profile.name} would have static {bits}-bit ones, where they "
        f"are quicker: {way_out}"
    )


def _quickest(request: Request) -> str:
    """Why the profile's activations gave way to quicker ones; empty when they did not."""
    runtime = runtimes()[request.runtime]
    asked = request.profile.choice(request.runtime, runtime.format.name)
    got = request.choice.activations
    unseen = request.calibration is None and asked.activations == "int8"
    wanted = runtime.engine.unseen if unseen else asked.activations
    if not asked.quickest or got == wanted or request.inventory is None:
        return ""
    times = [predicted(request.runtime, request.inventory, mode) for mode in (got, wanted)]
    said = {"float": "float", "dynamic": "quantized while running", "int8": "static in 8 bits"}
    return (
        f"{request.runtime}: activations are {said[got]}: by the times of its layers this model is no quicker with "
        f"them {said[wanted]} ({times[0]:.2g} and {times[1]:.2g} ms where they were measured)"
    )


def _slower(request: Request) -> list[str]:
    """That float would be quicker, by the times of the model's layers."""
    mode = request.choice.activations
    times = None if request.inventory is None else slower(request.runtime, request.inventory, mode)
    if times is None:
        return []
    form = {"dynamic": "quantized while running", "int8": "static in 8 bits"}[mode]
    return [
        f"{request.runtime}: with activations {form} this model is slower than in float by the times of its layers "
        f"({times[0]:.2g} and {times[1]:.2g} ms where they were measured): --profile fast is no slower than either"
    ]


def losses_of(row: ArtifactRow) -> dict[str, float]:
    """What each layer alone costs the outputs, noise over signal, where check/layers measured it."""
    return {name: value or 0.0 for name, value in row.by_weight(LOSS_OF).items()}


def _zeros(row: ArtifactRow, record: ProgramRecord) -> str:
    pruned = [use for use in record.inventory.weights if use.name in record.pruned]
    elements = sum(use.elements for use in pruned)
    zeros = sum(use.elements * record.pruned[use.name] for use in pruned)
    sparse = sum(encoding.kind == "sparse" for encoding in record.encodings.values())
    head = f"{row.runtime}: {zeros / max(elements, 1):.0%} of the pruned layers is zero"
    if sparse:
        return f"{head}; {sparse} of {len(pruned)} are stored without zeros"
    kinds = {record.encodings[use.name].kind for use in pruned if use.name in record.encodings}
    near = " (in a palette as the entry nearest to zero)" if "palette" in kinds else ""
    return f"{head}, and stored densely{near}: the file gains nothing by it"


def _ungrouped(requests: Sequence[Request], row: ArtifactRow, record: ProgramRecord) -> list[str]:
    """What asked-for groups of input channels do not divide."""
    request = next(item for item in requests if item.runtime == row.runtime)
    wanted = encoding_named(planned_encoding(request))
    if isinstance(wanted, MXFP4):
        size, instead = BLOCK, "int8, one scale a channel"
    elif isinstance(wanted, Affine) and wanted.group_size is not None:
        size, instead = wanted.group_size, "one scale a channel"
    else:
        return []
    names = [
        f"{use.name} ({use.shape[1]})"
        for use in record.inventory.weights
        if use.op in ("linear", "embedding") and use.shape[1] % size and _reach(record, use.name) == "channel"
    ]
    if not names:
        return []
    layers = counted(len(names), "layer")
    return [
        f"{row.runtime}: groups of {size} do not divide the inputs of {layers}: {instead} instead, "
        f"which {'takes' if isinstance(wanted, MXFP4) else 'loses'} more: {_some(names)}"
    ]


def _reach(record: ProgramRecord, name: str) -> str:
    encoding = record.encodings.get(name)
    dense = None if encoding is None else encoding.dense
    return dense.granularity if isinstance(dense, Affine) else ""


def _unpacked(requests: Sequence[Request], row: ArtifactRow, record: ProgramRecord) -> list[str]:
    """What fewer bits cost in time, where layers that count are unpacked at every run."""
    request = next((item for item in requests if item.runtime == row.runtime), None)
    if request is None:
        return []
    runtime, uses = runtimes()[row.runtime], {use.name: use.op for use in record.inventory.weights}
    slow = {
        name
        for name, encoding in record.encodings.items()
        if name in uses and runtime.unpacks(uses[name], encoding, request.choice.activations)
    }
    macs = sum(cost.macs for cost in record.inventory.ops if slow.intersection(cost.weights))
    share = macs / max(record.inventory.macs, 1)
    if share < UNPACKED_SHARE:
        return []
    is_ = "is" if len(slow) == 1 else "are"
    return [
        f"{row.runtime}: {counted(len(slow), 'layer')} with {share:.0%} of the arithmetic {is_} unpacked at every run, "
        "which is slower than float: --profile fast is quicker, at a larger size"
    ]


def _widened(row: ArtifactRow, record: ProgramRecord) -> list[str]:
    """Widths that the format lacks."""
    runtime, counts = runtimes()[row.runtime], Counter[tuple[int, int]]()
    for use in record.inventory.weights:
        if use.name in record.encodings:
            encoding = record.encodings[use.name]
            counts[encoding.bits, runtime.container_bits(use.op, encoding)] += 1
    return [
        f"{row.runtime}: {counted(count, 'layer')} of {bits} bits, stored in {room}: the file has no {bits}-bit form"
        for (bits, room), count in sorted(counts.items())
        if room > bits
    ]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _curve(row: ArtifactRow, record: ProgramRecord) -> str:
    decided = next((entry for entry in reversed(record.history) if entry.startswith("compress/allocate")), "")
    points = ", ".join(f"{human_bytes(size)} {loss:.2g}" for size, loss in record.curve)
    return f"{row.runtime}: bytes of weights and loss (noise over signal) of the best choices: {points}; {decided}"


def _ranking(row: ArtifactRow) -> str:
    losses = losses_of(row)
    worst = sorted(losses, key=lambda name: (-losses[name], name))[:SHOWN]
    shown = ", ".join(f"{name} {losses[name]:.2g}" for name in worst)
    return f"{row.runtime}: layers by what they cost the outputs (noise over signal): {shown}"


def _pruning(row: ArtifactRow, record: ProgramRecord) -> str:
    """What no bits give back: losses of layers are measured against the pruned model."""
    decided = next((entry for entry in reversed(record.history) if entry.startswith("compress/prune")), "")
    return f"{row.runtime}: pruning came first, and more bits do not undo it: {decided}; ask for a smaller sparsity"


def _given_back(request: Request) -> str:
    shown = _some([f"{name} {text}" for name, text in request.raised])
    return f"{request.runtime}: the accuracy gate gave {counted(len(request.raised), 'layer')} more bits: {shown}"


def _budget(request: Request) -> str:
    taken = human_bytes(request.spare_bytes)
    return f"{request.runtime}: the budget for weights was made {taken} smaller to meet the limit"
