"""load/torch: a Python factory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from edgeship.core.model import Source, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import Request
from edgeship.data.functions import check_function
from edgeship.data.specs import parse_inputs
from edgeship.errors import UsageError
from edgeship.program.suppression import CANDIDATES, check_candidates


@dataclass(frozen=True)
class LoadFactory(Pass):
    """Call a Python function that returns an nn.Module and export it.

    Args:
        cut: where the model ends instead of at its outputs: modules, or nodes of its graph.
        candidates: how many boxes, best first, go into one non-maximum suppression.
    """

    name: ClassVar[str] = "load/torch"
    tools: ClassVar[tuple[str, ...]] = ("torch",)

    reference: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    cut: tuple[str, ...] = ()
    candidates: int = CANDIDATES

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Takes ``file.py:function`` and ``package.module:function``."""
        source = request.source
        if source.form != "torch":
            return Skip(f"{source.reference} is not a Python factory")
        load = request.load
        return cls(
            source.reference,
            tuple(load["inputs"]),
            tuple(load["outputs"]),
            dict(load["notes"]),
            tuple(load.get("cut") or ()),
        )

    def confirm(self, request: Request) -> None:
        """Refuse a function that the file does not have, and ask for inputs, before anything is imported."""
        check_candidates(self.candidates)
        check_function(self.reference)
        if not self.inputs:
            raise UsageError(
                f"{self.reference} does not say what its inputs are", fix="add --input name:f32[1,3,224,224]"
            )
        parse_inputs(self.inputs)

    def run(self, model: Source, ctx: Context) -> TorchModel:
        """Call the factory with a fixed seed, export what it returns, and note every file it read."""
        from edgeship.data.specs import example_tensors, with_notes
        from edgeship.frontends.factory import call_factory
        from edgeship.frontends.reads import recorded_reads
        from edgeship.program.export import make_program

        with recorded_reads() as reads:
            module = call_factory(self.reference)
        specs = with_notes(parse_inputs(self.inputs), self.notes)
        program = make_program(
            module,
            specs,
            example_tensors(specs),
            output_names=self.outputs,
            note=f"{self.name}: {self.reference}",
            cut=self.cut,
            candidates=self.candidates,
        )
        program.save(ctx.folder / "program")
        (ctx.folder / "dependencies.json").write_text(json.dumps(reads.digests()), encoding="utf-8")
        return TorchModel(ctx.folder / "program", program.signature)
