"""compress/calibrate: decide static integer grids for activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from edgeship.core.model import TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import DataRef, Request
from edgeship.errors import LoweringError, UsageError


@dataclass(frozen=True)
class CalibrateActivations(Pass):
    """Run the model on calibration data and give every activation a static int8 or int16 grid.

    Args:
        bits: 8 (asymmetric) or 16 (symmetric).
        method: ``minmax``, ``percentile``, ``mse`` or ``entropy``; 16 bits have room for outliers, 8 bits clip them.
        samples: how many inputs at most.
        data: where they come from; drawn from ``seed`` when not given, which is right for tests of the lowering only.
    """

    name: ClassVar[str] = "compress/calibrate"
    tools: ClassVar[tuple[str, ...]] = ("torch",)
    settles: ClassVar[str] = "activations"
    after: ClassVar[tuple[str, ...]] = ("compress/quantize",)

    bits: int = 16
    method: Literal["minmax", "percentile", "mse", "entropy"] = "minmax"
    samples: int = 128
    data: DataRef | None = None
    seed: int = 0

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Configured when the profile wants static integer activations for this runtime."""
        activations = request.choice.activations
        if activations not in ("int8", "int16"):
            return Skip(f"profile {request.profile.name} keeps activations {activations}")
        bits = int(activations.removeprefix("int"))
        return cls(bits, "mse" if bits == 8 else "minmax", data=request.calibration)

    def confirm(self, request: Request) -> None:
        """Refuse to calibrate a decoder's step on caches drawn at random: they are nothing like real ones."""
        if self.data is None and request.load.get("part") == "decoder":
            raise UsageError(
                f"integer activations of a decoder for {request.runtime} want caches as they come: no data is given",
                fix="record them (docs/language-models.md) and give --calibration FILE.npz, or leave the runtime out",
            )

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Write the program in its static form, with ``record.activations`` set. Raises `DataError` for unfit data."""
        from edgeship.compression.calibrate import decide_activations
        from edgeship.data.batches import calibration_batches
        from edgeship.program.program import TorchProgram
        from edgeship.program.rewrites import for_static_activations

        if self.samples < 1:
            raise UsageError("compress/calibrate.samples must be at least 1", fix="leave it out for 128")
        program = for_static_activations(TorchProgram.open(model), self.bits)
        signature = program.signature
        batches = calibration_batches(self.data, signature, self.samples, self.seed)
        activations = decide_activations(
            program,
            batches,
            bits=self.bits,
            method=self.method,
            progress=lambda done, total: ctx.progress(done, total, "calibrating"),
        )
        origin = f"{len(batches)} samples" if self.data else f"{len(batches)} generated samples"
        note = f"{self.name}: int{self.bits} activations, {self.method} of {origin}"
        record = replace(program.record, activations=activations, history=(*program.record.history, note))
        replace(program, record=record).save(ctx.folder / "program")
        return TorchModel(ctx.folder / "program", signature)

    def ensures(self, output: TorchModel, **inputs: object) -> None:
        """Some activation has a grid."""
        from edgeship.program.program import read_record

        if not read_record(output).activations:
            raise LoweringError("no activation of the model can be quantized", fix="use --profile exact")
