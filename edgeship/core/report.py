"""What a build measured and decided: measurements, verdicts, and the report that holds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

How = Literal["measured", "emulated", "estimated", "reported"]

# Names of check/layers' figures of one weight, before the weight's name: in dB; noise over signal at the outputs.
SNR_OF, LOSS_OF = "snr:", "loss:"


@dataclass(frozen=True)
class Measurement:
    """One number and how it was come by.

    Args:
        unit: ``ms``, ``bytes``, ``dB``, ``fraction`` ... as stored, never pre-formatted.
        how: ``measured`` on this host, ``emulated``, ``estimated`` with a band, or ``reported`` by a device.
        device: ``host`` or a target's name. low, high: the band of an estimate, or the spread of runs.
        runs: how many runs are behind it. versions: tool versions.
        note: what a reader must know (why something is not timed here, say).
    """

    kind: ClassVar[str] = "measurement"
    name: str
    value: float | None
    unit: str
    how: How
    device: str = "host"
    runtime: str = ""
    low: float | None = None
    high: float | None = None
    runs: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """The end of a check.

    Args:
        check: pass name. runtime: what was checked. passed: whether it holds.
        summary: one sentence with the figures. measurements: the figures.
        fix: the way out when it does not hold.
        by_hand: limits that the user moved with ``--set``, as ``check/verify.min_snr_db=10``.
        remark: what a reader must know although it holds: that much of the original is lost, say.
    """

    kind: ClassVar[str] = "verdict"
    check: str
    runtime: str
    passed: bool
    summary: str
    measurements: tuple[Measurement, ...] = ()
    fix: str = ""
    by_hand: tuple[str, ...] = ()
    remark: str = ""

    def measurement(self, name: str) -> Measurement | None:
        """One figure by name, or None."""
        return next((item for item in self.measurements if item.name == name), None)


@dataclass(frozen=True)
class Measurements:
    """What a benchmark pass ends in."""

    kind: ClassVar[str] = "measurements"
    items: tuple[Measurement, ...]


@dataclass(frozen=True)
class ArtifactRow:
    """One line of the final table: an artifact with everything known about it.

    Args:
        target: names, joined with commas. file: name of the file or folder to open. size_bytes: on disk.
        weights, activations: encodings in words. execution: whether the real engine or an emulator ran it.
        verdicts, measurements: every figure; `figure` finds one by name.
        memory_bytes: what the app will need on the device.
    """

    target: str
    runtime: str
    file: str
    size_bytes: int
    weights: str
    activations: str
    execution: How
    verdicts: tuple[Verdict, ...]
    measurements: tuple[Measurement, ...] = ()
    memory_bytes: int = 0

    @property
    def by_hand(self) -> tuple[str, ...]:
        """Limits of its checks that the user moved."""
        return tuple(limit for verdict in self.verdicts for limit in verdict.by_hand)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader must know although its checks hold."""
        return tuple(verdict.remark for verdict in self.verdicts if verdict.remark)

    @property
    def passed(self) -> bool:
        """Whether every check of this artifact holds."""
        return all(verdict.passed for verdict in self.verdicts)

    def figure(self, name: str) -> Measurement | None:
        """One figure by name, from the verdicts or the benchmarks."""
        for verdict in self.verdicts:
            found = verdict.measurement(name)
            if found is not None:
                return found
        return next((item for item in self.measurements if item.name == name), None)

    def by_weight(self, prefix: str) -> dict[str, float | None]:
        """What check/layers measured of each weight: ``SNR_OF`` or ``LOSS_OF``."""
        return {
            item.name.removeprefix(prefix): item.value
            for verdict in self.verdicts
            for item in verdict.measurements
            if item.name.startswith(prefix)
        }


@dataclass(frozen=True)
class StepTime:
    """How long one step took, and whether it came from the cache."""

    step: str
    seconds: float
    cached: bool


@dataclass(frozen=True)
class Refusal:
    """An artifact that was not made: where the way to it ended, and why.

    Args:
        target, runtime: of the route. step: the pass that ended it; empty when it could not be planned.
        reason: one sentence. fix: the way out. exit_code: that of the error, 70 for a fault of edgeship's own.
    """

    target: str
    runtime: str
    step: str
    reason: str
    fix: str = ""
    exit_code: int = 1

    def __str__(self) -> str:
        where = f" ({self.step})" if self.step else ""
        return f"{self.runtime} on {self.target}: {self.reason}{where}{f'; {self.fix}' if self.fix else ''}"


@dataclass(frozen=True)
class Report:
    """Everything one build says, as printed, as JSON, and as ``report.json`` in the bundle.

    Args:
        bundle: folder, or empty when nothing was published.
        refused: routes that ended without an artifact.
        skipped: pass name -> reason.
        notes: what a reader must know besides the table: why a runtime got its encodings, what the gates changed.
    """

    source: str
    profile: str
    targets: tuple[str, ...]
    bundle: str
    rows: tuple[ArtifactRow, ...]
    steps: tuple[StepTime, ...]
    skipped: dict[str, str]
    machine: dict[str, str]
    versions: dict[str, str]
    created: str
    log: str = ""
    notes: tuple[str, ...] = ()
    refused: tuple[Refusal, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every artifact that was asked for was made and passed every check."""
        return not self.refused and all(row.passed for row in self.rows)
