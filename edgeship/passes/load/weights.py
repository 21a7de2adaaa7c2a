"""load/weights: a safetensors file, or a checkpoint of any trainer, into a factory's module."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgeship.core.model import Source, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import DataRef, Request
from edgeship.data.specs import parse_inputs
from edgeship.errors import UsageError
from edgeship.program.suppression import CANDIDATES, check_candidates

if TYPE_CHECKING:
    from pathlib import Path

    from edgeship.frontends.state_dicts import WeightSet


@dataclass(frozen=True)
class LoadWeights(Pass):
    """Load weights from safetensors (or a checkpoint, without running code) into a factory's module.

    Args:
        key: which of the sets of weights in the file, where several fit.
        cut: where the model ends instead of at its outputs: modules, or nodes of its graph.
        candidates: how many boxes, best first, go into one non-maximum suppression.
    """

    name: ClassVar[str] = "load/weights"
    tools: ClassVar[tuple[str, ...]] = ("torch", "safetensors")

    factory: DataRef = field(default_factory=lambda: DataRef("", ""))
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    key: str = ""
    cut: tuple[str, ...] = ()
    candidates: int = CANDIDATES

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Takes ``.safetensors`` and what ``torch.save`` writes, under any suffix, with ``--factory``."""
        from edgeship.core.artifact import script_digest

        if request.source.form not in ("safetensors", "pickle"):
            return Skip(f"{request.source.reference} is not a weights file")
        load = request.load
        factory = DataRef(str(load["factory"]), script_digest(str(load["factory"])))
        key, cut = str(load.get("weights_key") or ""), tuple(load.get("cut") or ())
        return cls(factory, tuple(load["inputs"]), tuple(load["outputs"]), dict(load["notes"]), key, cut)

    def confirm(self, request: Request) -> None:
        """Ask for inputs before anything is imported."""
        check_candidates(self.candidates)
        if not self.inputs:
            raise UsageError("weights do not say what the inputs are", fix="add --input name:f32[1,3,224,224]")
        parse_inputs(self.inputs)

    def run(self, model: Source, ctx: Context) -> TorchModel:
        """Read the weights, put them into the module strictly, export it."""
        from edgeship.data.specs import example_tensors, with_notes
        from edgeship.frontends.factory import call_factory
        from edgeship.frontends.fitting import fill
        from edgeship.frontends.reads import recorded_reads
        from edgeship.program.export import make_program
        from edgeship.program.program import REMARK

        sets = sets_in(model.path)
        with recorded_reads() as reads:
            module = call_factory(self.factory.reference)
        remarks = fill(module, sets, model.path.name, self.key)
        specs = with_notes(parse_inputs(self.inputs), self.notes)
        note = f"{self.name}: {model.path.name} into {self.factory.reference}"
        program = make_program(
            module,
            specs,
            example_tensors(specs),
            output_names=self.outputs,
            note=note,
            cut=self.cut,
            candidates=self.candidates,
        )
        history = (*program.record.history, *(f"{REMARK}{remark}" for remark in remarks))
        program = replace(program, record=replace(program.record, history=history))
        program.save(ctx.folder / "program")
        (ctx.folder / "dependencies.json").write_text(json.dumps(reads.digests()), encoding="utf-8")
        return TorchModel(ctx.folder / "program", program.signature)


def sets_in(path: Path) -> list[WeightSet]:
    """Every set of weights in a file. No code is run.

    Raises:
        SourceError: damaged. UnsafeSourceError: a pickle that calls functions that nobody here answers.
    """
    from edgeship.frontends.state_dicts import safetensors_set, weight_sets
    from edgeship.program.checkpoint import open_checkpoint

    if path.suffix.lower() == ".safetensors":
        return [safetensors_set(path)]
    return weight_sets(open_checkpoint(path))
