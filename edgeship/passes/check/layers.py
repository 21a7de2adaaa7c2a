"""check/layers: what storing each layer so costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from edgeship.core.model import Artifact, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import DataRef, Request
from edgeship.core.report import LOSS_OF, SNR_OF, Measurement, Verdict
from edgeship.core.units import counted
from edgeship.errors import UsageError


@dataclass(frozen=True)
class CheckLayers(Pass):
    """Report the error of every stored weight against its float values, and what each costs the model's outputs.

    Args:
        outputs: also run the model once a layer, with that layer alone as it is stored. Takes time; the accuracy gate
            asks for it when it falls short.
        samples: inputs for that. data: where they come from; generated from ``seed`` when not given.
    """

    name: ClassVar[str] = "check/layers"
    tools: ClassVar[tuple[str, ...]] = ("torch",)

    runtime: str = ""
    outputs: bool = False
    samples: int = 32
    data: DataRef | None = None
    seed: int = 0

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Planned when weights are encoded at all."""
        if request.choice.weights == "float32":
            return Skip(f"profile {request.profile.name} keeps weights in float32")
        return cls(request.runtime, request.rank, data=request.calibration or request.evaluation)

    def confirm(self, request: Request) -> None:
        """Refuse to measure on nothing."""
        if self.samples < 1:
            raise UsageError(f"{self.name}.samples must be at least 1", fix="leave it out for 32")

    def run(self, model: Artifact, reference: TorchModel, ctx: Context) -> Verdict:
        """Figures a layer; the verdict always holds."""
        import numpy as np

        from edgeship.program.program import TorchProgram

        program = TorchProgram.open(reference)
        figures = []
        for done, (name, tensor) in enumerate(program.encoded.items()):
            ctx.progress(done, len(program.encoded), name)
            weight = program.weights[name].float().numpy()
            noise = float(np.square(weight - tensor.dequantize()).sum(dtype=np.float64))
            signal = float(np.square(weight).sum(dtype=np.float64))
            ratio = 10 * np.log10(signal / noise) if noise > 0 and signal > 0 else None
            figures.append(Measurement(f"{SNR_OF}{name}", ratio, "dB", "measured", runtime=self.runtime))
        figures += self._losses(program, ctx) if self.outputs and program.encoded else []
        worst = min(
            (item for item in figures if item.unit == "dB" and item.value is not None), key=_value, default=None
        )
        summary = f"{counted(len(program.encoded), 'weight')} encoded"
        if worst is not None:
            summary += f"; the least exact is {worst.name.removeprefix(SNR_OF)} with {_value(worst):.1f} dB"
        return Verdict(self.name, self.runtime, True, summary, tuple(figures))

    def _losses(self, program: object, ctx: Context) -> list[Measurement]:
        from edgeship.compression.sensitivity import measure_sensitivity
        from edgeship.data.batches import calibration_batches
        from edgeship.program.program import TorchProgram

        assert isinstance(program, TorchProgram)
        batches = calibration_batches(self.data, program.signature, self.samples, self.seed)
        # The program with its float weights: as loaded, or as pruning and smoothing left them.
        plain = replace(program, encoded={}, record=replace(program.record, activations={}, encodings={}))
        names = list(program.encoded)
        found = measure_sensitivity(
            plain,
            ((name, [program.encoded[name]]) for name in names),
            batches,
            lambda name: ctx.progress(names.index(name), len(names), f"{name} alone"),
        )
        return [
            Measurement(
                f"{LOSS_OF}{name}", options[0].loss, "fraction", "measured", runtime=self.runtime, runs=len(batches)
            )
            for name, options in found.items()
        ]


def _value(item: Measurement) -> float:
    return item.value or 0.0
