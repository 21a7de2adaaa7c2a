"""check/verify: run the saved artifact and compare it with the torch program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from edgeship.core.forms import ActivationMode
from edgeship.core.model import Artifact, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import DataRef, Request
from edgeship.core.report import Measurement, Verdict
from edgeship.core.runtimes import Runtime
from edgeship.core.units import counted
from edgeship.data.probes import ORDINARY
from edgeship.errors import UsageError
from edgeship.program.answers import Answers
from edgeship.program.compare import MAX_SNR_DB
from edgeship.program.judging import LEAST_DB, ROOM_DB, Finding, Scales, judge, unanswered
from edgeship.program.ranges import outputs_of_shares
from edgeship.program.trial import FED_BACK, GIVEN, NOISE, Questions, Trial

if TYPE_CHECKING:
    from edgeship.program.program import TorchProgram
    from edgeship.program.trial import Kind

# The lowest ratio to the reference with the same stored numbers, by what the arithmetic is. Float32 differs by order of
# summation only; float16 rounds each operator (ViT reaches 68 dB, MobileNetV2 34); integer activations differ by
# a step of their grid here and there, decided while running for ``dynamic``.
MIN_SNR_DB: dict[str, float] = {"f32": 70.0, "f16": 30.0, "int16": 30.0, "int8": 18.0, "dynamic": 18.0}
# On probes engines' own approximations of sigmoid and exp show: the maker's file is as far off there.
PROBE_F32_DB = 60.0
# Share of equal integers, and how much less than the original with itself may agree.
AGREEMENT, AGREEMENT_ROOM = 0.99, 0.05
# The lowest ratio to the original: of weights in float, and in 8 bits or with integer activations. Fewer bits have no
# limit of their own: what they lose is what was asked for, and the verdict says when that is much.
FLOAT_TOTAL_DB, INTEGER_TOTAL_DB = 30.0, 18.0
# Networks of tens of layers with activations in 8 bits keep their decisions at 13 to 16 dB: EfficientNet-Lite0 agrees
# with its original in 93 %. Below INTEGER_TOTAL_DB the verdict is marked.
ACTIVATIONS_TOTAL_DB = 12.0
# Keys and values rounded to 254 steps: trained and random small models reach 33 to 52 dB.
INT8_CACHE_SNR_DB = 24.0
# Share of the rows chosen by scores that must be the reference's, and the original's by the limit to it. With float
# arithmetic it is every row that does not hang on a hair; grids decide some otherwise. One may always be lost.
ROWS = {"f32": 1.0, "f16": 1.0, "int16": 1.0}
INTEGER_ROWS = 0.9
TOTAL_ROWS = ((FLOAT_TOTAL_DB, 0.98), (INTEGER_TOTAL_DB, 0.9), (ACTIVATIONS_TOTAL_DB, 0.75))
NATIVE_SAMPLES = 16
MOST_SAMPLES = 10_000
# The name of the figures of what fell short; the note of each is its kind of inputs.
SHORT_ON = "short_on"
EMULATED_SAMPLES = 4


@dataclass(frozen=True)
class VerifyArtifact(Pass):
    """Load the artifact from disk, read its weights back, run it, and compare it with the torch reference.

    Args:
        samples: how many inputs; at least 16, or 4 where only an emulator runs.
        data: where they come from. Generated from ``seed`` when not given; where it holds fewer, the rest is generated.
        calibration: what calibration saw, which is never compared on.
        min_snr_db: the limit against the reference with the same stored numbers; by the arithmetic when not given.
        min_total_db: the limit against the original; by the encodings when not given, and none below 8 bits.
        reshaped: pruning or training was asked for, which changes the answers on purpose: no limit to the original.
    """

    name: ClassVar[str] = "check/verify"
    tools: ClassVar[tuple[str, ...]] = ("torch",)
    limits: ClassVar[tuple[str, ...]] = ("min_snr_db", "min_total_db")
    decided: ClassVar[Mapping[str, str]] = {
        "reshaped": "--set compress/prune or compress/finetune",
        "calibration": "--calibration",
    }

    runtime: str = ""
    samples: int = NATIVE_SAMPLES
    data: DataRef | None = None
    calibration: DataRef | None = None
    seed: int = 0
    min_snr_db: float | None = None
    min_total_db: float | None = None
    activations: ActivationMode = "float"
    reshaped: bool = False

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Always planned; takes evaluation data first, then calibration data, else generates."""
        return cls(
            request.runtime,
            _fewest(request.runtime),
            request.evaluation or request.calibration,
            request.calibration,
            activations=request.choice.activations,
            reshaped=bool({"compress/prune", "compress/finetune"} & set(request.options)),
        )

    def confirm(self, request: Request) -> None:
        """Refuse to compare on less than proves anything."""
        fewest = _fewest(self.runtime)
        if self.samples < fewest:
            raise UsageError(
                f"{self.name}.samples must be at least {fewest} for {self.runtime}", fix="leave it out, or give more"
            )
        if self.samples > MOST_SAMPLES:
            raise UsageError(f"{self.name}.samples of {self.samples} would take days", fix=f"{MOST_SAMPLES} at most")

    def run(self, model: Artifact, reference: TorchModel, original: TorchModel, ctx: Context) -> Verdict:
        """Compare; the verdict's figures are the lowering error, the total error, and the weights read back.

        The total error is what the user loses, so its figure is taken on the given inputs alone where there are any.
        """
        from edgeship.core.registry import runtimes
        from edgeship.program.program import TorchProgram

        runtime = runtimes()[self.runtime]
        program = TorchProgram.open(reference)
        problem, counted = stored_problem(runtime, model, program)
        questions = self.questions(program)
        by_hand = self.min_snr_db is not None or self.min_total_db is not None
        arithmetic = self._arithmetic(model)
        kept = Answers(ctx.shared, reference.digest), Answers(ctx.shared, original.digest)
        trial = Trial.start(program, TorchProgram.open(original), arithmetic, questions, by_hand=by_hand, kept=kept)
        beside = {} if trial.large else runtime.read_adapters(model)
        seen = _Seen(problem, counted, len(questions.given), len(questions.usual))
        with runtime.open(model) as session:
            trial.ask(session, model, questions, ctx, adapters=bool(beside))
            trial.adapt(session, model, beside)
        verdict = self._verdict(runtime, model, seen, trial)
        short = {item.note for item in verdict.measurements if item.name == SHORT_ON}
        if not verdict.passed and trial.condition_again(questions, short):
            verdict = self._verdict(runtime, model, seen, trial)
        return verdict

    def questions(self, program: TorchProgram) -> Questions:
        """Given inputs that calibration did not see, drawn ones up to ``samples``, and probes."""
        from edgeship.data.batches import calibrated_keys, generate_batches, load_batches
        from edgeship.data.probes import probe_batches
        from edgeship.data.states import state_pairs

        signature = program.signature
        given = []
        if self.data is not None:
            calibrated = calibrated_keys(self.calibration, signature)
            given = load_batches(self.data.reference, signature, self.samples, without=calibrated)
        drawn = generate_batches(signature, self.samples - len(given), self.seed)
        states = {} if program.record.decoder is not None else state_pairs(signature)
        probes = {probe.kind: probe.batch for probe in probe_batches(signature, self.seed)}
        return Questions(given, drawn, probes, states, far=probes.keys() - set(ORDINARY))

    def limit(self, model: Artifact) -> tuple[str, float]:
        """The arithmetic in a word, and the lowest ratio that passes for it."""
        arithmetic = self._arithmetic(model)
        limit = MIN_SNR_DB.get(arithmetic, 18.0)
        if model.language is not None and model.language.cache == "int8":
            arithmetic, limit = f"{arithmetic} with an int8 cache", min(limit, INT8_CACHE_SNR_DB)
        return arithmetic, limit if self.min_snr_db is None else self.min_snr_db

    def _arithmetic(self, model: Artifact) -> str:
        return self.activations if self.activations != "float" else model.compute

    def total_limit(self, program: TorchProgram) -> float | None:
        """The lowest ratio to the original; None where weights have fewer than 8 bits and nothing was set."""
        if self.min_total_db is not None:
            return self.min_total_db
        bits = min((encoding.bits for encoding in program.record.encodings.values()), default=32)
        if bits < 8 or self.reshaped:
            return None
        if self.activations in ("int8", "dynamic"):
            return ACTIVATIONS_TOTAL_DB
        return FLOAT_TOTAL_DB if bits >= 16 else INTEGER_TOTAL_DB

    def _verdict(self, runtime: Runtime, model: Artifact, seen: _Seen, trial: Trial) -> Verdict:
        arithmetic, limit = self.limit(model)
        findings = Findings.of(trial, limit, self.total_limit(trial.program), fixed=self.min_snr_db is not None)
        reasons = [*self._reasons(trial, seen, arithmetic, limit), *findings.reasons(arithmetic)]
        reasons += _row_reasons(trial, self.total_limit(trial.program))
        lowering, total = trial.lowering, trial.total
        inputs = seen.inputs(trial)
        summary = (
            f"{counted(seen.counted, 'weight')} read back equal, {lowering.snr_db:.1f} dB to the reference, "
            f"{total.snr_db:.1f} dB to the original"
        )
        if findings.worst is not None:
            summary += f" (worst {findings.worst})"
        if trial.rows.sets:
            summary += (
                f", chosen rows that agree: {trial.rows_near} with the reference; {trial.rows_far} with the original"
            )
        summary += f", {inputs}"
        summary += "".join(f", {item.snr_db:.1f} dB with the adapter {key}" for key, item in trial.adapters.items())
        summary += findings.left_out()
        return Verdict(
            self.name, runtime.name, not reasons, "; ".join([*reasons, f"on {inputs}"]) if reasons else summary,
            self._figures(runtime, seen, trial, findings),
            fix=self._fix(trial) if reasons else "",
            remark=findings.remark(total.snr_db),
        )  # fmt: skip

    def _fix(self, trial: Trial) -> str:
        """The way out of what fell short: data for grids that had none, then a wider encoding where there is one."""
        if not trial.lowering.has_signal:
            return "give --calibration DATA on which the outputs differ: outputs that never do cannot be compared"
        if trial.static and self.calibration is None:
            return "give --calibration DATA: without it the grids must hold whatever may come; or try --profile exact"
        if trial.static or any(item.bits < 16 for item in trial.program.record.encodings.values()):
            return "look at the log; try --profile exact to see whether the encoding is the cause"
        return "look at the log; name the other runtimes with --runtime, or move the limits of check/verify with --set"

    def _figures(self, runtime: Runtime, seen: _Seen, trial: Trial, findings: Findings) -> tuple[Measurement, ...]:
        how = "emulated" if runtime.engine.execution == "emulated" else "measured"
        lowering, total, engines = trial.lowering, trial.total, trial.engines

        def figure(name: str, value: float, unit: str, runs: int = lowering.samples, note: str = "") -> Measurement:
            return Measurement(name, value, unit, how, runtime=runtime.name, runs=runs, note=note)  # type: ignore[arg-type]

        figures = [
            figure("lowering_snr", lowering.snr_db, "dB"),
            figure("lowering_max_error", lowering.max_error, "absolute"),
            figure("total_snr", total.snr_db, "dB", total.samples),
            figure("total_max_error", total.max_error, "absolute", total.samples),
            figure("agreement", lowering.agreement, "fraction"),
            figure("weights_read_back", seen.counted, "tensors"),
            figure("samples", lowering.samples, "inputs"),
        ]
        if findings.worst is not None:
            worst = findings.worst
            figures.append(figure("worst_slice_snr", worst.snr_db, "dB", note=str(worst)))
            figures.append(figure("worst_slice_distinct", worst.distinct, "values", note=str(worst)))
        figures += [
            figure(SHORT_ON, finding.snr_db, "dB", note=finding.kind)
            for finding in (*findings.lowering, *findings.total)
            if not finding.passed
        ]
        if engines.samples:
            figures.append(figure("engines_snr", engines.snr_db, "dB"))
        if trial.rows.sets:
            near, far = trial.rows_near, trial.rows_far
            figures.append(figure("rows_agreed", near.agreed, f"of {near.wanted}", note=str(near)))
            figures.append(figure("rows_kept", far.agreed, f"of {far.wanted}", note=str(far)))
        if trial.close:
            figures.append(figure("positions_left_out", trial.close, f"of {trial.positions}"))
        figures += [
            figure(f"adapter_{key}_snr", item.snr_db, "dB", item.samples) for key, item in trial.adapters.items()
        ]
        return tuple(figures)

    def _reasons(self, trial: Trial, seen: _Seen, arithmetic: str, limit: float) -> list[str]:
        """What fell short over all usual inputs, besides the findings on slices and probes."""
        lowering, engines = trial.lowering, trial.engines
        reasons = [
            f"{item.snr_db:.1f} dB with the adapter {key}, {limit:g} dB wanted for {arithmetic}"
            for key, item in trial.adapters.items()
            if item.snr_db < limit
        ]
        reasons += [
            f"the adapter {key} does not bring the answers nearer to what it was trained for" for key in trial.idle
        ]
        if seen.problem:
            reasons.append(seen.problem)
        if not lowering.has_signal:
            reasons.append("the reference says nothing: its outputs do not depend on the input, or are all but zero")
        noise = trial.kinds.get(NOISE)
        if GIVEN not in trial.kinds and noise is not None and noise.own is not None and not trial.static:
            # On noise alone, no artifact must be nearer than the original is to itself; but it must say something.
            limit = min(limit, max(noise.own.snr_db - ROOM_DB, LEAST_DB))
        if lowering.snr_db < limit:
            reasons.append(f"{lowering.snr_db:.1f} dB against the reference, {limit:g} dB wanted for {arithmetic}")
        if lowering.agreement < _least_agreement(trial):
            reasons.append(f"integer outputs agree in {lowering.agreement:.1%} of elements only")
        if engines.samples and engines.snr_db < limit:
            reasons.append(f"the emulator and the CPU differ on the same file: {engines.snr_db:.1f} dB")
        return reasons


def _least_agreement(trial: Trial) -> float:
    """Share of integers that must agree: on noise no more than the original agrees with itself when it is rounded, as
    a place among nearly equal scores changes by that alone."""
    noise = trial.kinds.get(NOISE)
    if GIVEN in trial.kinds or noise is None or noise.own is None or trial.static:
        return AGREEMENT
    return min(AGREEMENT, noise.own.agreement - AGREEMENT_ROOM)


def _row_reasons(trial: Trial, total_limit: float | None) -> list[str]:
    """Which kinds of inputs have rows chosen by scores that others have not."""
    from edgeship.program.conditioning import LARGEST_HALF

    least = ROWS.get(trial.arithmetic, INTEGER_ROWS)
    least_far = max(
        (share for limit, share in TOTAL_ROWS if total_limit is not None and total_limit >= limit), default=0
    )
    found = []
    for name, kind in trial.kinds.items():
        probe = kind.own is not None and name not in (FED_BACK, NOISE)
        beyond = trial.halves and kind.peak.value > LARGEST_HALF
        # Far from what an app gives, rows say something only where the program itself decides on all of them.
        said_nothing = probe and (trial.coarse or beyond or bool(kind.rows.close or kind.rows_total.close))
        if kind.refused or kind.beyond or said_nothing:
            continue
        if kind.rows.share < least:
            found.append(f"{kind.rows} chosen rows agree with the reference on {name}")
        elif kind.rows_total.faults > 1 and kind.rows_total.share < least_far:
            found.append(f"{kind.rows_total} chosen rows agree with the original on {name}")
    return found[:3]


@dataclass(frozen=True)
class Findings:
    """What the slices of each kind of inputs show.

    Args:
        lowering, total: the worst finding of each kind, worst first, against the reference and the original.
        dropped: kinds that were not judged, with the reason.
    """

    lowering: tuple[Finding, ...]
    total: tuple[Finding, ...]
    dropped: dict[str, str]

    @classmethod
    def of(cls, trial: Trial, limit: float, total_limit: float | None, *, fixed: bool = False) -> Findings:
        """Judge every kind; without a limit to the original, the worst slice is found all the same.

        Args:
            fixed: ``limit`` is the user's own, and is not lowered on probes.
        """
        shares = outputs_of_shares(trial.original)
        scales, total_scales = Scales(shares), Scales(shares)
        for name in (GIVEN, NOISE, *ORDINARY):
            if name in trial.kinds:
                scales.widen(trial.kinds[name].lowering)
                total_scales.widen(trial.kinds[name].total)
        dropped = {name: f"the original does not run on it ({words})" for name, words in trial.not_asked.items()}
        compared = {name: kind.lowering for name, kind in trial.kinds.items()}
        for name, count in unanswered(compared).items():
            dropped[name] = f"the original answers NaN or infinity in {count} numbers"
        lowering: list[Finding] = []
        total: list[Finding] = []
        for name, kind in trial.kinds.items():
            near = _near(trial, name, kind, scales, limit, fixed=fixed)
            far = [] if kind.beyond or kind.refused else _far(trial, name, kind, total_scales, total_limit)
            if kind.beyond:
                dropped[name] = f"beyond what calibration saw: {kind.beyond}"
            for found, kept in ((near, lowering), (far, total)):
                excuse = _excuse(trial, kind, found)
                if excuse:
                    dropped[name] = excuse
                else:
                    kept += found
        return cls(_worst_first(lowering), _worst_first(total), dropped)

    @property
    def worst(self) -> Finding | None:
        """The slice that is furthest from the original, on inputs as they are given, drawn or fed back; elsewhere when
        it falls short there."""
        short = [item for item in self.total if not item.passed]
        usual = [item for item in self.total if item.kind in (GIVEN, NOISE, FED_BACK)]
        return min(short or usual, key=lambda item: item.snr_db, default=None)

    def reasons(self, arithmetic: str) -> list[str]:
        """Why the artifact must not ship."""
        found = [
            f"{item} against the reference, {item.limit_db:.0f} dB wanted for {arithmetic}"
            for item in self.lowering
            if not item.passed
        ][:3]
        found += [
            f"{item} against the original ({item.distinct} distinct values), {item.limit_db:.0f} dB wanted"
            for item in self.total
            if not item.passed
        ][:3]
        return found

    def left_out(self) -> str:
        """What was not judged, for the summary."""
        return "".join(f"; left out: {name}, {reason}" for name, reason in self.dropped.items())

    def remark(self, total_snr_db: float) -> str:
        """Why the loss is much, though within what was asked for; empty when it is not."""
        if self.worst is not None and self.worst.snr_db < INTEGER_TOTAL_DB and self.worst.kind == GIVEN:
            return f"far from the original: {self.worst}"
        if total_snr_db < INTEGER_TOTAL_DB:
            return f"far from the original: {total_snr_db:.1f} dB"
        return ""


def _near(trial: Trial, name: str, kind: Kind, scales: Scales, limit: float, *, fixed: bool = False) -> list[Finding]:
    """The worst slice against the reference with the same numbers; nothing for static grids, where answers differ by a
    step here and there, in small slices as in large ones: there whole outputs are compared."""
    if kind.refused:
        return [Finding(name, "every output", "", -MAX_SNR_DB, limit, fault=f"not answered: {kind.refused}")]
    if kind.own is not None and name != NOISE and trial.arithmetic == "f32" and not fixed:
        limit = min(limit, PROBE_F32_DB)
    if trial.arithmetic == "dynamic" and not fixed:
        # The reference rounds no activations: of a slice this is the artifact's whole loss, as against the original.
        limit = min(limit, ACTIVATIONS_TOTAL_DB)
    return [] if trial.static else judge(name, kind.lowering, scales, limit, halves=trial.halves, own=kind.own)[:1]


def _far(trial: Trial, name: str, kind: Kind, scales: Scales, limit: float | None) -> list[Finding]:
    """The worst slice against the original."""
    wanted = -MAX_SNR_DB if limit is None else limit
    if limit == INTEGER_TOTAL_DB and name not in (GIVEN, NOISE, FED_BACK, *ORDINARY):
        # Far from what networks are fed with, eight bits are asked not to break it, no more.
        wanted = ACTIVATIONS_TOTAL_DB
    found = judge(
        name, kind.total, scales, wanted,
        static=trial.static, halves=trial.halves, stored=trial.narrow, own=kind.own_total,
    )[:1]  # fmt: skip
    if trial.coarse and kind.own is not None and name not in (FED_BACK, NOISE):
        # Steps of 1/256 of what calibration saw: on other inputs it is only asked not to break.
        return [item for item in found if item.fault.startswith("NaN")]
    return found


def _worst_first(findings: list[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda item: (item.fault == "", item.snr_db - item.limit_db)))


def _excuse(trial: Trial, kind: Kind, findings: list[Finding]) -> str:
    """Why a kind of inputs says nothing of this artifact; empty when it does. Given inputs and noise always do."""
    from edgeship.program.conditioning import LARGEST_HALF

    if kind.own is None:
        return ""
    if any(item.lowered and item.limit_db < LEAST_DB for item in findings):
        return "the original itself moves as much when its values are rounded"
    short = any(not item.passed for item in findings)
    if short and trial.arithmetic == "f16" and kind.peak.value > LARGEST_HALF:
        return f"{kind.peak.operator} ({kind.peak.node}) reaches {kind.peak.value:.3g}, float16 ends at 65504"
    return ""


@dataclass(frozen=True)
class _Seen:
    """What was read back and asked.

    Args:
        problem: why stored numbers are not the decided ones. counted: how many tensors were read back.
        given: inputs from data. samples: usual inputs in all.
    """

    problem: str
    counted: int
    given: int
    samples: int

    def inputs(self, trial: Trial) -> str:
        """How many inputs, where from, and what of them was not compared."""
        text = counted(self.samples, "input")
        if 0 < self.given < self.samples:
            text += f" ({self.given} given, {self.samples - self.given} generated)"
        probes = len([name for name, kind in trial.kinds.items() if kind.own is not None and name != NOISE])
        if probes:
            text += f" and {counted(probes, 'kind')} of probes"
        if trial.close:
            text += f" without {trial.close} of {trial.positions} positions where experts are chosen by a hair"
        if trial.crowded:
            text += (
                f", {trial.crowded} of {trial.positions} such positions compared because they are most of their text"
            )
        return text


def _fewest(runtime: str) -> int:
    """How many inputs are enough to trust a comparison, and no fewer are."""
    from edgeship.core.registry import runtimes

    engine = runtimes()[runtime].engine
    # A text is as many comparisons as it has tokens.
    few = engine.execution == "emulated" or engine.for_language
    return EMULATED_SAMPLES if few else NATIVE_SAMPLES


def stored_problem(runtime: Runtime, model: Artifact, program: TorchProgram) -> tuple[str, int]:
    """Why the saved weights or grids are not the decided ones (empty when they are), and how many were compared."""
    from edgeship.core.weights import same_numbers

    grids = runtime.read_activations(model)
    for node, grid in program.activations.items():
        if grids is not None and grids.get(node) != grid:
            return f"activation {node} was decided as {grid}, and is stored as {grids.get(node)}", 0
    if not program.encoded:
        return "", 0
    stored = runtime.read_weights(model)
    uses = {use.name: use.op for use in program.record.inventory.weights}
    for name, tensor in program.encoded.items():
        if name not in stored:
            return f"weight {name} was decided but is not found in the artifact", 0
        container = runtime.container_bits(uses.get(name, "other"), tensor.encoding)
        held = runtime.forms.translated(tensor)
        difference = same_numbers(held, stored[name], container_bits=container)
        if difference:
            return f"weight {name} is not stored as decided: {difference}", 0
    return "", len(program.encoded)
