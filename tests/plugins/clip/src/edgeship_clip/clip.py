"""compress/clip: pull outliers of weights in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from edgeship.core.model import TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import Request
from edgeship.errors import LoweringError, UsageError


@dataclass(frozen=True)
class ClipWeights(Pass):
    """Pull weights in that lie far from the mean of their layer, so that few bits cover the others better.

    Planned only when asked for: ``--set compress/clip.deviations=4``.

    Args:
        deviations: how far a weight may lie from the mean of its layer, in standard deviations.
    """

    name: ClassVar[str] = "compress/clip"
    tools: ClassVar[tuple[str, ...]] = ("torch",)
    settles: ClassVar[str] = "outliers"
    before: ClassVar[tuple[str, ...]] = ("compress/quantize",)

    deviations: float = 4.0

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Itself when an option of it is set."""
        if cls.name not in request.options:
            return Skip("not asked for: --set compress/clip.deviations=4")
        return cls()

    def confirm(self, request: Request) -> None:
        """Refuse to pull everything in."""
        if self.deviations <= 0:
            raise UsageError(f"{self.name}.deviations={self.deviations:g} leaves nothing", fix="give a number above 0")

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Write the program with its weights clipped."""
        from edgeship.program.program import TorchProgram

        program = TorchProgram.open(model)
        changed = {}
        for use in program.record.inventory.weights:
            if use.op == "other" or use.name in program.record.aliases:
                continue
            weight = program.weights[use.name].float()
            middle, reach = weight.mean(), self.deviations * weight.std()
            changed[use.name] = weight.clamp(middle - reach, middle + reach)
        note = f"{self.name}: {len(changed)} layers, {self.deviations:g} deviations"
        record = replace(program.record, history=(*program.record.history, note))
        replace(program, record=record, weights={**program.weights, **changed}).save(ctx.folder / "program")
        return TorchModel(ctx.folder / "program", model.signature)

    def ensures(self, output: TorchModel, **inputs: Any) -> None:
        """Nothing but weights changed: the program has the inputs, outputs and operators that it had."""
        from edgeship.program.program import read_record

        before, after = read_record(inputs["model"]), read_record(output)
        if (before.signature, before.inventory) != (after.signature, after.inventory):
            raise LoweringError(f"{self.name} changed more than weights", fix="report this as a bug of edgeship-clip")
