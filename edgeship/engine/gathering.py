"""From the results of the steps to the report: which artifacts were made, what was decided for them, how they did."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeship.core.artifact import BuiltArtifact, EncodingRecord, Gathered, total_bytes
from edgeship.core.encodings.families import GROUP as ENCODINGS
from edgeship.core.model import Artifact, TorchModel
from edgeship.core.plan import Plan, Step
from edgeship.core.plugins import packages_of
from edgeship.core.profile import Request
from edgeship.core.registry import runtimes
from edgeship.core.report import SNR_OF, ArtifactRow, Measurement, Measurements, Refusal, Report, Verdict
from edgeship.core.weights import Encoding
from edgeship.engine.chatter import Log
from edgeship.engine.executor import Execution
from edgeship.engine.notes import losses_of, notes_of
from edgeship.engine.planner import refusal_of
from edgeship.program.program import ProgramRecord
from edgeship.version import __version__


@dataclass(frozen=True)
class Prepared:
    """A planned build: the plan, and what running it needs.

    Args:
        requests: those that are planned. remarks: on the data that were given, for the report.
        all_or_nothing: one route without an artifact, or one check that falls short, ends the build.
    """

    plan: Plan
    requests: tuple[Request, ...]
    loaded: TorchModel
    load_step: Step
    load_execution: Execution
    remarks: tuple[str, ...] = ()
    all_or_nothing: bool = False

    @property
    def gates(self) -> frozenset[str]:
        """Checks whose limits the user set: one that falls short holds everything back."""
        request = self.requests[0]
        asked = {"check/size": request.max_size_bytes is not None, "check/accuracy": request.max_drop is not None}
        return frozenset(name for name, given in asked.items() if given)


def publishable(prepared: Prepared, report: Report) -> tuple[ArtifactRow, ...]:
    """The artifacts that may ship: those that passed, unless a limit of the user's holds everything back."""
    failed = [verdict for row in report.rows for verdict in row.verdicts if not verdict.passed]
    if any(verdict.check in prepared.gates or verdict.by_hand for verdict in failed):
        return ()
    if prepared.all_or_nothing and not report.passed:
        return ()
    return tuple(row for row in report.rows if row.passed)


def gather_all(prepared: Prepared, execution: Execution, output: Path, source: str, log: Log) -> Gathered:
    """Everything the steps made, for the report and for the passes that end a build.

    Args:
        output: the bundle. source: as the user named it.
    """
    built: list[BuiltArtifact] = []
    rows: list[ArtifactRow] = []
    records: list[ProgramRecord] = []
    refused = execution.refused(prepared.plan)
    for step in prepared.plan.steps:
        result = execution.results.get(step.index)
        final = isinstance(result, Artifact) and not any(
            step.index in later.inputs.values() and later.name.startswith("lower/") and later.routes == step.routes
            for later in prepared.plan.steps
        )
        if not final or not isinstance(result, Artifact):
            continue
        mine = [
            route for route in step.routes if runtimes()[route[1]].artifact is type(result) and route not in refused
        ]
        if not mine:
            continue
        names = tuple(dict.fromkeys(target for target, _ in mine))
        record = _decided_in(prepared.plan, step, execution)
        records.append(record)
        encodings, activations = _decided(record, result)
        choice = next(item for item in prepared.requests if item.runtime == mine[0][1]).choice
        row = _row(prepared, step, execution, result, names, encodings, activations)
        encodings = _with_costs(encodings, row, record.losses)
        size, bits = _weight_bytes(record, result, encodings)
        built.append(BuiltArtifact(names, result, choice, encodings, activations, size, bits, record.curve))
        rows.append(row)
    report = Report(
        source=source,
        profile=prepared.requests[0].profile.name,
        targets=_targets(prepared),
        bundle="",
        rows=tuple(rows),
        steps=(*prepared.load_execution.times, *execution.times),
        skipped=prepared.plan.skipped,
        machine=machine(),
        versions=_versions(prepared.requests),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        log=str(log.path),
        notes=(*prepared.remarks, *notes_of(prepared.requests, rows, records)),
        refused=(*prepared.plan.refused, *refusals(prepared.plan, execution)),
    )
    from edgeship.program.program import ORIGIN

    inventory = prepared.requests[0].inventory
    assert inventory is not None
    origin = prepared.loaded.path / ORIGIN
    return Gathered(
        output, prepared.requests[0], prepared.plan, tuple(built), report, inventory, prepared.loaded.digest,
        origin if origin.is_dir() else None,
    )  # fmt: skip


def _targets(prepared: Prepared) -> tuple[str, ...]:
    """Names of all targets that were asked for, in order."""
    planned = [request.target.name for request in prepared.requests]
    refused = [name for item in prepared.plan.refused for name in item.target.split(",")]
    return tuple(dict.fromkeys([*planned, *refused]))


def refusals(plan: Plan, execution: Execution) -> list[Refusal]:
    """What ended in an error while it ran, a line for each runtime: its targets share the step that failed."""
    targets: dict[tuple[str, int], list[str]] = {}
    for (target, runtime), index in execution.refused(plan).items():
        targets.setdefault((runtime, index), []).append(target)
    return [
        refusal_of(execution.failures[index], ",".join(names), runtime, plan.steps[index].name)
        for (runtime, index), names in targets.items()
    ]


def _decided_in(plan: Plan, step: Step, execution: Execution) -> ProgramRecord:
    """The record of the program behind an artifact."""
    from edgeship.program.program import read_record

    index = next(iter(step.inputs.values()))
    while not isinstance(execution.results[index], TorchModel):
        index = next(iter(plan.steps[index].inputs.values()))
    program = execution.results[index]
    assert isinstance(program, TorchModel)
    return read_record(program)


def _decided(
    record: ProgramRecord, artifact: Artifact
) -> tuple[dict[str, EncodingRecord], dict[str, tuple[int, float, int]]]:
    """What compression decided for the program behind an artifact, with where the artifact keeps it."""
    placements = {placement.weight: placement for placement in artifact.placements}
    uses = {use.name: use for use in record.inventory.weights}
    runtime = runtimes()[artifact.runtime]

    def stored(name: str, encoding: Encoding) -> int:
        return -(-runtime.stored_bits(uses[name], encoding, record.pruned.get(name, 0.0)) // 8)

    encodings = {
        name: EncodingRecord(str(encoding), encoding.bits, uses[name].shape, placements[name], stored(name, encoding))
        for name, encoding in record.encodings.items()
    }
    activations = {name: (item.bits, item.scale, item.zero_point) for name, item in record.activations.items()}
    return encodings, activations


def _with_costs(
    encodings: Mapping[str, EncodingRecord], row: ArtifactRow, measured: Mapping[str, float]
) -> dict[str, EncodingRecord]:
    """The records with what check/layers measured of each, or what compress/quantize did before it rounded."""
    ratios, losses = row.by_weight(SNR_OF), {**measured, **losses_of(row)}
    return {
        name: dataclasses.replace(item, snr_db=ratios.get(name), loss=losses.get(name))
        for name, item in encodings.items()
    }


def _weight_bytes(
    record: ProgramRecord, artifact: Artifact, encodings: Mapping[str, EncodingRecord]
) -> tuple[int, float]:
    """Bytes of all weights as stored, and bits a scalar; what is not encoded is in the precision of the arithmetic."""
    halves = artifact.compute == "f16"
    uses = [use for use in record.inventory.weights if use.name not in record.aliases]
    total = sum(
        encodings[use.name].bytes if use.name in encodings else use.elements * use.bits_unencoded(halves=halves) // 8
        for use in uses
    )
    return total, 8 * total / max(sum(use.elements for use in uses), 1)


def _row(
    prepared: Prepared,
    step: Step,
    execution: Execution,
    artifact: Artifact,
    names: tuple[str, ...],
    encodings: Mapping[str, EncodingRecord],
    activations: Mapping[str, Any],
) -> ArtifactRow:
    runtime = runtimes()[artifact.runtime]
    verdicts: list[Verdict] = []
    measurements: list[Measurement] = []
    for later in prepared.plan.steps:
        result = execution.results.get(later.index)
        if later.inputs.get("model") != step.index:
            continue
        if isinstance(result, Verdict):
            verdicts.append(_with_limits_by_hand(result, later, prepared.requests[0]))
        elif isinstance(result, Measurements):
            measurements.extend(result.items)
    kinds = dict.fromkeys(record.encoding for record in encodings.values())
    request = next(item for item in prepared.requests if item.runtime == runtime.name)
    row = ArtifactRow(
        target=",".join(names),
        runtime=runtime.name,
        file=artifact.path.name,
        size_bytes=total_bytes(artifact.path),
        weights=", ".join(kinds) or ("float16" if artifact.compute == "f16" else "float32"),
        activations=request.choice.activations if activations or request.choice.activations == "dynamic" else "float",
        execution="emulated" if runtime.engine.execution == "emulated" else "measured",
        verdicts=tuple(verdicts),
        measurements=tuple(measurements),
    )
    memory = row.figure("memory_bytes")
    return dataclasses.replace(row, memory_bytes=int(memory.value or 0) if memory else 0)


def _with_limits_by_hand(verdict: Verdict, step: Step, request: Request) -> Verdict:
    """The verdict, saying which of its limits are the user's own: it must not look as if it met ours."""
    given = request.options.get(step.name, {})
    moved = tuple(f"{step.name}.{name}={given[name]}" for name in step.task.limits if name in given)
    if not moved:
        return verdict
    summary = f"{verdict.summary}; limit set by hand: {', '.join(moved)}"
    return dataclasses.replace(verdict, summary=summary, by_hand=moved)


def machine() -> dict[str, str]:
    """What the numbers were taken on: processor, cores, memory, system."""
    import os

    import psutil

    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory_gib": f"{psutil.virtual_memory().total / 2**30:.0f}",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        # Python's own answer there is "arm" for every chip.
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        with suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return platform.processor() or "unknown"


def _versions(requests: Sequence[Request]) -> dict[str, str]:
    from importlib import metadata

    found = {"edgeship": __version__, "torch": metadata.version("torch")}
    for request in requests:
        found.update(runtimes()[request.runtime].versions())
    # Who opens the bundle needs the packages whose encodings are in it.
    found.update(packages_of(ENCODINGS))
    return dict(sorted(found.items()))
