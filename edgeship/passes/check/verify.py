"""check/verify: run the saved artifact and compare it with the torch program."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgeship.core.model import Artifact, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import DataRef, Request
from edgeship.core.report import Measurement, Verdict
from edgeship.core.runtimes import ENGINE_PACKAGES, ActivationMode, Runtime
from edgeship.errors import UsageError
from edgeship.program.compare import Comparison, Reference
from edgeship.program.routers import WITHIN

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeship.program.program import TorchProgram

# The lowest ratio to the reference with the same stored numbers, by what the arithmetic is. Float32 differs by order of
# summation only; float16 rounds each operator (ViT reaches 68 dB, MobileNetV2 34); integer activations differ by
# a step of their grid here and there, decided while running for ``dynamic``.
MIN_SNR_DB: dict[str, float] = {"f32": 70.0, "f16": 30.0, "int16": 30.0, "int8": 18.0, "dynamic": 18.0}
# Keys and values rounded to 254 steps: trained and random small models reach 33 to 52 dB.
INT8_CACHE_SNR_DB = 24.0
NATIVE_SAMPLES = 16
EMULATED_SAMPLES = 4
# Where experts are chosen by a hair at more of a text's positions than this, all are compared (`program.routers`).
MOST_LEFT_OUT = 0.5


@dataclass(frozen=True)
class VerifyArtifact(Pass):
    """Load the artifact from disk, read its weights back, run it, and compare it with the torch reference.

    Args:
        samples: how many inputs; at least 16, or 4 where only an emulator runs.
        data: where they come from. Generated from ``seed`` when not given; where it holds fewer, the rest is generated.
        calibration: what calibration saw, which is never compared on.
        min_snr_db: the limit; by the arithmetic of the artifact when not given.
    """

    name: ClassVar[str] = "check/verify"
    tools: ClassVar[tuple[str, ...]] = ("torch", *ENGINE_PACKAGES)
    limits: ClassVar[tuple[str, ...]] = ("min_snr_db",)

    runtime: str = ""
    samples: int = NATIVE_SAMPLES
    data: DataRef | None = None
    calibration: DataRef | None = None
    seed: int = 0
    min_snr_db: float | None = None
    activations: ActivationMode = "float"

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Always planned; takes evaluation data first, then calibration data, else generates."""
        return cls(
            request.runtime,
            _fewest(request.runtime),
            request.evaluation or request.calibration,
            request.calibration,
            activations=request.choice.activations,
        )

    def confirm(self, request: Request) -> None:
        """Refuse to compare on less than proves anything."""
        fewest = _fewest(self.runtime)
        if self.samples < fewest:
            raise UsageError(
                f"{self.name}.samples must be at least {fewest} for {self.runtime}", fix="leave it out, or give more"
            )

    def run(self, model: Artifact, reference: TorchModel, original: TorchModel, ctx: Context) -> Verdict:
        """Compare; the verdict's figures are the lowering error, the total error, and the weights read back.

        The total error is what the user loses, so it is taken on the given inputs alone where there are any.
        """
        from edgeship.core.registry import runtimes
        from edgeship.data.batches import calibrated_keys, generate_batches, load_batches
        from edgeship.program.adapted import adapted
        from edgeship.program.program import TorchProgram
        from edgeship.program.streamed import is_large

        runtime = runtimes()[self.runtime]
        program = TorchProgram.open(reference)
        problem, counted = stored_problem(runtime, model, program)
        signature = program.signature
        given = []
        if self.data is not None:
            calibrated = calibrated_keys(self.calibration, signature)
            given = load_batches(self.data.reference, signature, self.samples, without=calibrated)
        batches = [*given, *generate_batches(signature, self.samples - len(given), self.seed)]
        seen = _Seen(problem, counted, len(given), len(batches))
        beside = runtime.read_adapters(model)
        if is_large(program):
            beside = {}
        # What the first inputs gave without an adapter: batch, reference, artifact.
        plain: list[tuple[Any, Any, Any]] = []
        decided = Reference(program, ahead=batches)
        loaded = Reference(TorchProgram.open(original), ahead=given or batches)
        within = WITHIN.get(self._arithmetic(model), WITHIN["dynamic"])
        with runtime.open(model) as session:
            for done, batch in enumerate(batches):
                ctx.progress(done, len(batches), "comparing")
                found = session.run(_fitted(model, batch))
                wanted = decided.run(batch)
                close = seen.left_out(decided, batch, within) if program.record.decoder is not None else None
                seen.lowering.add(seen.clear(wanted, close), seen.clear(found, close))
                if done < len(given) or not given:
                    seen.total.add(loaded.run(batch), found)
                second = session.run_on_cpu(_fitted(model, batch)) if done < EMULATED_SAMPLES else None
                if second is not None:
                    seen.engines.add(seen.clear(second, close), seen.clear(found, close))
                if beside and done < EMULATED_SAMPLES:
                    plain.append((batch, wanted, found))
            for name, matrices in beside.items():
                changed = Reference(adapted(program, matrices))
                session.adapt(name)
                seen.adapters[name], unmoved, change = Comparison(), Comparison(), Comparison()
                for batch, wanted, found in plain:
                    trained, close = changed.run(batch), changed.undecided(batch, within)
                    answered = session.run(_fitted(model, batch))
                    seen.adapters[name].add(seen.clear(trained, close), seen.clear(answered, close))
                    unmoved.add(seen.clear(trained, close), seen.clear(found, close))
                    change.add(seen.clear(trained, close), seen.clear(wanted, close))
                # One that the engine ignored is no nearer than the base; one that was never trained adds nothing.
                if change.max_error > 0 and not seen.adapters[name].snr_db > unmoved.snr_db:
                    seen.idle.append(name)
        return self._verdict(runtime, model, seen)

    def limit(self, model: Artifact) -> tuple[str, float]:
        """The arithmetic in a word, and the lowest ratio that passes for it."""
        arithmetic = self._arithmetic(model)
        limit = MIN_SNR_DB.get(arithmetic, 18.0)
        if model.facts.get("cache") == "int8":
            arithmetic, limit = f"{arithmetic} with an int8 cache", min(limit, INT8_CACHE_SNR_DB)
        return arithmetic, limit if self.min_snr_db is None else self.min_snr_db

    def _arithmetic(self, model: Artifact) -> str:
        return self.activations if self.activations != "float" else model.compute

    def _verdict(self, runtime: Runtime, model: Artifact, seen: _Seen) -> Verdict:
        arithmetic, limit = self.limit(model)
        how = "emulated" if runtime.execution == "emulated" else "measured"
        lowering, total, engines = seen.lowering, seen.total, seen.engines

        def figure(name: str, value: float, unit: str, runs: int = lowering.samples) -> Measurement:
            return Measurement(name, value, unit, how, runtime=runtime.name, runs=runs)  # type: ignore[arg-type]

        figures = [
            figure("lowering_snr", lowering.snr_db, "dB"),
            figure("lowering_max_error", lowering.max_error, "absolute"),
            figure("total_snr", total.snr_db, "dB", total.samples),
            figure("total_max_error", total.max_error, "absolute", total.samples),
            figure("agreement", lowering.agreement, "fraction"),
            figure("weights_read_back", seen.counted, "tensors"),
            figure("samples", lowering.samples, "inputs"),
        ]
        if engines.samples:
            figures.append(figure("engines_snr", engines.snr_db, "dB"))
        if seen.close:
            figures.append(figure("positions_left_out", seen.close, f"of {seen.positions}"))
        figures += [
            figure(f"adapter_{key}_snr", item.snr_db, "dB", item.samples) for key, item in seen.adapters.items()
        ]
        reasons = [
            f"{item.snr_db:.1f} dB with the adapter {key}, {limit:g} dB wanted for {arithmetic}"
            for key, item in seen.adapters.items()
            if item.snr_db < limit
        ]
        reasons += [
            f"the adapter {key} does not bring the answers nearer to what it was trained for" for key in seen.idle
        ]
        if seen.problem:
            reasons.append(seen.problem)
        if not lowering.has_signal:
            reasons.append("the reference says nothing: its outputs do not depend on the input, or are all but zero")
        if lowering.snr_db < limit:
            reasons.append(f"{lowering.snr_db:.1f} dB against the reference, {limit:g} dB wanted for {arithmetic}")
        if lowering.agreement < 0.99:
            reasons.append(f"integer outputs agree in {lowering.agreement:.1%} of elements only")
        if engines.samples and engines.snr_db < limit:
            reasons.append(f"the emulator and the CPU differ on the same file: {engines.snr_db:.1f} dB")
        summary = (
            f"{seen.counted} weights read back equal, {lowering.snr_db:.1f} dB to the reference, "
            f"{total.snr_db:.1f} dB to the original, {seen.inputs}"
        )
        summary += "".join(f", {item.snr_db:.1f} dB with the adapter {key}" for key, item in seen.adapters.items())
        return Verdict(
            self.name, runtime.name, not reasons, "; ".join([*reasons, f"on {seen.inputs}"]) if reasons else summary,
            tuple(figures),
            fix="" if not reasons else "look at the log; try --profile exact to see whether the encoding is the cause",
        )  # fmt: skip


@dataclass
class _Seen:
    """What the comparisons of one artifact found.

    Args:
        problem: why stored numbers are not the decided ones. counted: how many tensors were read back.
        given: inputs from data. samples: inputs in all.
        positions: of texts, in models with experts or without. close: those left out. crowded: those that would have
            been, in texts with so many that all were compared.
        idle: adapters that the engine ignored.
    """

    problem: str
    counted: int
    given: int
    samples: int
    lowering: Comparison = field(default_factory=Comparison)
    total: Comparison = field(default_factory=Comparison)
    engines: Comparison = field(default_factory=Comparison)
    adapters: dict[str, Comparison] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)
    positions: int = 0
    close: int = 0
    crowded: int = 0

    def left_out(self, reference: Reference, batch: Any, within: float) -> npt.NDArray[Any]:
        """Positions of a text that are chosen by a hair, counted; none when that is most of it."""
        close = reference.undecided(batch, within)
        self.positions += close.size
        if close.mean() > MOST_LEFT_OUT:
            self.crowded += int(close.sum())
            close[:] = False
        self.close += int(close.sum())
        return close

    @property
    def inputs(self) -> str:
        """How many inputs, where from, and what of them was not compared."""
        text = f"{self.samples} inputs"
        if 0 < self.given < self.samples:
            text += f" ({self.given} given, {self.samples - self.given} generated)"
        if self.close:
            text += f" without {self.close} of {self.positions} positions where experts are chosen by a hair"
        if self.crowded:
            text += f", {self.crowded} of {self.positions} such positions compared because they are most of their text"
        return text

    @staticmethod
    def clear(answers: Any, close: npt.NDArray[Any] | None) -> Any:
        """The answers ``[1, T, vocabulary]``, nothing in place of the positions that are chosen by a hair."""
        if close is None or not close.any():
            return answers
        return {name: value * ~close[None, :, None] for name, value in answers.items()}


def _fewest(runtime: str) -> int:
    """How many inputs are enough to trust a comparison, and no fewer are."""
    from edgeship.core.registry import runtimes

    engine = runtimes()[runtime]
    # A text is as many comparisons as it has tokens.
    few = engine.execution == "emulated" or engine.language_of
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
        difference = same_numbers(tensor, stored[name], container_bits=container)
        if difference:
            return f"weight {name} is not stored as decided: {difference}", 0
    return "", len(program.encoded)


def _fitted(model: Artifact, batch: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """A batch in the dtypes that the artifact takes."""
    from edgeship.core.runtimes import as_numpy

    return {spec.name: as_numpy(batch[spec.name], spec.numpy_dtype) for spec in model.signature.inputs}
