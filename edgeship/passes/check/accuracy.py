"""check/accuracy: measure the metric on the artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from edgeship.core.artifact import script_digest
from edgeship.core.model import Artifact, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import DataRef, Request
from edgeship.core.report import Measurement, Verdict
from edgeship.core.runtimes import Engine
from edgeship.core.units import counted
from edgeship.errors import DataError, UsageError

# How many samples follows from the engine and the model's arithmetic, never from the time it takes: a busy machine must
# come to the same figure. Models above SAMPLE_MACS get fewer, in proportion, which keeps it at a few minutes.
SAMPLE_MACS = 5 * 10**8
LEAST = 100
# A text is as many predictions as it has tokens.
LEAST_TEXTS = 8
# What a profile's max_drop is a share of. A loss of 0.5 % has no meaning for decibels or for a function of the user's:
# such a metric is measured, and gates only with a --max-drop of its own.
TASK_METRICS = ("accuracy", "perplexity")


@dataclass(frozen=True)
class CheckAccuracy(Pass):
    """Measure accuracy, or another metric, on the artifact itself, beside the model it came from.

    Args:
        data: what is measured on. calibration: what calibration saw; such samples are left out where others are there.
        metric: ``accuracy``, ``perplexity``, ``cosine``, ``snr``, or ``file.py:function``.
        max_drop: the largest drop allowed, as a fraction; not gated when None. The profile's is for `TASK_METRICS`.
        metric_digest: of the file that a user's function lies in.
        required: the user asked for the figure, so data that cannot give it is an error.
        limit: how many samples at most, spread evenly over the data; the baseline is taken on the same ones. Fewer for
            engines and models that are slow here: see `affordable_samples`.
    """

    name: ClassVar[str] = "check/accuracy"
    tools: ClassVar[tuple[str, ...]] = ("torch",)
    decided: ClassVar[Mapping[str, str]] = {
        "metric": "--metric",
        "required": "--metric",
        "metric_digest": "--metric",
        "calibration": "--calibration",
    }
    limits: ClassVar[tuple[str, ...]] = ("max_drop",)

    runtime: str = ""
    data: DataRef | None = None
    calibration: DataRef | None = None
    metric: str = "accuracy"
    max_drop: float | None = None
    required: bool = False
    metric_digest: str = ""
    limit: int = Engine.eval_samples

    def confirm(self, request: Request) -> None:
        """Refuse a metric that nobody knows, and to measure on nothing."""
        from edgeship.data.metrics import find_metric

        find_metric(self.metric)
        if self.limit < 1:
            raise UsageError(f"{self.name}.limit must be at least 1", fix="leave it out, or give more")

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Planned when there is evaluation data."""
        if request.evaluation is None:
            return Skip("no --eval data")
        metric = request.metric or "accuracy"
        drop = request.max_drop
        if drop is None and metric in TASK_METRICS:
            drop = request.profile.max_drop
        required = request.max_drop is not None or request.metric is not None
        digest = script_digest(request.metric or "")
        limit = affordable_samples(request)
        return cls(
            request.runtime, request.evaluation, request.calibration, metric, drop, required, digest, limit
        )  # fmt: skip

    def run(self, model: Artifact, original: TorchModel, ctx: Context) -> Verdict:
        """The metric on the artifact and on the original, over the same samples."""
        from edgeship.core.registry import runtimes
        from edgeship.core.runtimes import as_numpy
        from edgeship.data.batches import calibrated_keys, load_samples
        from edgeship.data.metrics import find_metric
        from edgeship.program.answers import Answers
        from edgeship.program.compare import Reference
        from edgeship.program.program import TorchProgram

        assert self.data is not None
        program = TorchProgram.open(original)
        calibrated = calibrated_keys(self.calibration, program.signature)
        samples = load_samples(self.data.reference, program.signature, self.limit, without=calibrated)
        seen = ""
        if not len(samples):
            samples = load_samples(self.data.reference, program.signature, self.limit)
            seen = ", all of which calibration saw"
        metric = find_metric(self.metric)
        if metric.needs_labels and samples.labels is None:
            if self.required:
                raise DataError(
                    f"{self.data.reference} has no labels, and {metric.name} needs them",
                    fix="add an array named label, or choose another --metric",
                )
            return Verdict(self.name, self.runtime, True, f"the evaluation data has no labels: no {metric.name}")
        runtime = runtimes()[self.runtime]
        baseline = Reference(program, ahead=samples.inputs, kept=Answers(ctx.shared, original.digest))
        count = len(samples)
        with runtime.open(model) as session:
            for done, batch in enumerate(samples.inputs):
                if done % 16 == 0:
                    ctx.progress(done, count, "evaluating")
                fitted = {spec.name: as_numpy(batch[spec.name], spec.numpy_dtype) for spec in model.signature.inputs}
                label = None if samples.labels is None else samples.labels[done]
                metric.add(batch, session.run(fitted), baseline.run(batch), label)
        score = metric.checked()
        how = "emulated" if runtime.engine.execution == "emulated" else "measured"
        figures = tuple(
            Measurement(name, value, unit, how, runtime=runtime.name, runs=count)  # type: ignore[arg-type]
            for name, value, unit in (
                (metric.name, score.after, metric.unit),
                (f"{metric.name}_original", score.before, metric.unit),
                (f"{metric.name}_drop", score.drop, "fraction"),
            )
        )
        summary = f"{metric.describe(score)}, on {counted(count, 'sample')}{seen}"
        if self.max_drop is not None and score.drop > self.max_drop + 1e-9:
            summary = f"{summary}: a drop of {score.drop:.2%}, {self.max_drop:.2%} allowed"
            return Verdict(
                self.name, self.runtime, False, summary, figures, fix="try --profile exact, or raise --max-drop"
            )
        return Verdict(self.name, self.runtime, True, summary, figures)


def affordable_samples(request: Request) -> int:
    """How many samples the metric is taken on at most: the engine's number, or fewer for a model of much arithmetic."""
    from edgeship.core.registry import runtimes

    most = runtimes()[request.runtime].engine.eval_samples
    macs = request.inventory.macs if request.inventory else 0
    least = LEAST_TEXTS if request.decoder is not None else LEAST
    return min(most, max(least, most * SAMPLE_MACS // macs)) if macs else most
