"""check/accuracy: measure the metric on the artifact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgeship.core.model import Artifact, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import DataRef, Request
from edgeship.core.report import Measurement, Verdict
from edgeship.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

NATIVE_LIMIT = 2000
EMULATED_LIMIT = 600


@dataclass(frozen=True)
class CheckAccuracy(Pass):
    """Measure accuracy on labelled data, on the artifact itself, beside the model it came from.

    Args:
        max_drop: the largest loss allowed, as a fraction of all samples; not gated when None.
        limit: how many samples at most, spread evenly; fewer where only an emulator runs.
    """

    name: ClassVar[str] = "check/accuracy"
    tools: ClassVar[tuple[str, ...]] = ("torch", "onnxruntime", "coremltools", "coreai-core", "ai-edge-litert")

    runtime: str = ""
    data: DataRef | None = None
    max_drop: float | None = None
    limit: int = NATIVE_LIMIT

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Planned when there is evaluation data."""
        from edgeship.core.registry import runtimes

        if request.evaluation is None:
            return Skip("no --eval data")
        emulated = runtimes()[request.runtime].execution == "emulated"
        drop = request.max_drop if request.max_drop is not None else request.profile.max_drop
        return cls(request.runtime, request.evaluation, drop, EMULATED_LIMIT if emulated else NATIVE_LIMIT)

    def run(self, model: Artifact, original: TorchModel, ctx: Context) -> Verdict:
        """Top-1 accuracy of the first output, on the artifact and on the original, over the same samples."""
        from edgeship.core.registry import runtimes
        from edgeship.core.runtimes import as_numpy
        from edgeship.data.batches import load_samples
        from edgeship.program.compare import Reference
        from edgeship.program.program import TorchProgram

        assert self.data is not None
        program = TorchProgram.open(original)
        samples = load_samples(self.data.reference, program.signature, self.limit)
        if samples.labels is None:
            return Verdict(self.name, self.runtime, True, "the evaluation data has no labels: no accuracy")
        runtime = runtimes()[self.runtime]
        output = program.signature.outputs[0].name
        baseline = Reference(program)
        right_before = right_after = 0
        with runtime.open(model) as session:
            for done, (batch, label) in enumerate(zip(samples.inputs, samples.labels, strict=True)):
                if done % 16 == 0:
                    ctx.progress(done, len(samples), "evaluating")
                fitted = {spec.name: as_numpy(batch[spec.name], spec.numpy_dtype) for spec in model.signature.inputs}
                right_before += top1(baseline.run(batch)[output]) == int(label)
                right_after += top1(session.run(fitted)[output]) == int(label)
        before, after = right_before / len(samples), right_after / len(samples)
        how = "emulated" if runtime.execution == "emulated" else "measured"
        figures = tuple(
            Measurement(name, value, "fraction", how, runtime=runtime.name, runs=len(samples))  # type: ignore[arg-type]
            for name, value in (("accuracy", after), ("accuracy_original", before), ("accuracy_drop", before - after))
        )
        summary = f"accuracy {after:.2%} against {before:.2%} of the original, on {len(samples)} samples"
        if self.max_drop is not None and before - after > self.max_drop + 1e-9:
            summary = f"{summary}: more than the {self.max_drop:.2%} allowed"
            return Verdict(
                self.name, self.runtime, False, summary, figures, fix="try --profile exact, or raise --max-drop"
            )
        return Verdict(self.name, self.runtime, True, summary, figures)


def top1(scores: npt.NDArray[Any]) -> int:
    """The class with the highest score of one sample, ``[..., classes]``. Raises `DataError` when it is NaN."""
    import numpy as np

    if not bool(np.isfinite(scores).all()):
        raise DataError("the model's scores are not finite, so there is no accuracy", fix="check the artifact's inputs")
    return int(np.argmax(scores.reshape(-1)))
