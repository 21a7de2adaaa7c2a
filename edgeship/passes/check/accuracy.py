"""check/accuracy: measure the metric on the artifact."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgeship.core.model import Artifact, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import DataRef, Request
from edgeship.core.report import Measurement, Verdict
from edgeship.core.runtimes import ENGINE_PACKAGES
from edgeship.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

# Emulators take up to a second a run: after SECONDS the rest of the data is left, but not before LEAST samples ran.
LIMIT = 2000
LEAST = 100
SECONDS = 60.0


@dataclass(frozen=True)
class CheckAccuracy(Pass):
    """Measure accuracy on labelled data, on the artifact itself, beside the model it came from.

    Args:
        max_drop: the largest loss allowed, as a fraction of all samples; not gated when None.
        limit: how many samples at most, spread evenly over the data.
        least, seconds: a slow engine stops after so many seconds, once it has run the least number of samples. The
            report says how many it ran; the baseline is taken on the same ones.
    """

    name: ClassVar[str] = "check/accuracy"
    tools: ClassVar[tuple[str, ...]] = ("torch", *ENGINE_PACKAGES)

    runtime: str = ""
    data: DataRef | None = None
    max_drop: float | None = None
    limit: int = LIMIT
    least: int = LEAST
    seconds: float = SECONDS

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Planned when there is evaluation data."""
        if request.evaluation is None:
            return Skip("no --eval data")
        drop = request.max_drop if request.max_drop is not None else request.profile.max_drop
        return cls(request.runtime, request.evaluation, drop)

    def run(self, model: Artifact, original: TorchModel, ctx: Context) -> Verdict:
        """Top-1 accuracy of the first output, on the artifact and on the original, over the same samples."""
        import numpy as np

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
        right_before = right_after = count = 0
        # A fixed shuffle, so that a run cut short has met every class.
        order = np.random.default_rng(0).permutation(len(samples))
        begin = time.monotonic()
        with runtime.open(model) as session:
            for count, index in enumerate(order, 1):
                batch, label = samples.inputs[index], samples.labels[index]
                if count % 16 == 0:
                    ctx.progress(count, len(samples), "evaluating")
                fitted = {spec.name: as_numpy(batch[spec.name], spec.numpy_dtype) for spec in model.signature.inputs}
                right_before += top1(baseline.run(batch)[output]) == int(label)
                right_after += top1(session.run(fitted)[output]) == int(label)
                if count >= self.least and time.monotonic() - begin > self.seconds:
                    break
        before, after = right_before / count, right_after / count
        how = "emulated" if runtime.execution == "emulated" else "measured"
        figures = tuple(
            Measurement(name, value, "fraction", how, runtime=runtime.name, runs=count)  # type: ignore[arg-type]
            for name, value in (("accuracy", after), ("accuracy_original", before), ("accuracy_drop", before - after))
        )
        summary = f"accuracy {after:.2%} against {before:.2%} of the original, on {count} of {len(samples)} samples"
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
