"""load/torchscript: an archive that ``torch.jit.save`` wrote."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from edgeship.core.model import Source, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import Request
from edgeship.data.specs import split_inputs


@dataclass(frozen=True)
class LoadTorchScript(Pass):
    """Read a TorchScript archive by its own graph; its code is interpreted here and never run by Python or torch.

    Args:
        inputs: sizes (``x:f32[1,3,224,224]``) and fixed values (``sr=16000``), by the names of ``forward``.
        cut: where the model ends instead of at its outputs: nodes of its graph.
    """

    name: ClassVar[str] = "load/torchscript"
    tools: ClassVar[tuple[str, ...]] = ("torch",)

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    cut: tuple[str, ...] = ()

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Takes archives of ``torch.jit.save``, under any suffix."""
        if request.source.form != "torchscript":
            return Skip(f"{request.source.reference} is not a TorchScript archive")
        load = request.load
        return cls(tuple(load["inputs"]), tuple(load["outputs"]), dict(load["notes"]), tuple(load.get("cut") or ()))

    def confirm(self, request: Request) -> None:
        """Refuse inputs that nobody can read before anything is imported."""
        split_inputs(self.inputs)

    def run(self, model: Source, ctx: Context) -> TorchModel:
        """Interpret ``forward`` while it is exported, and bring it into normal form."""
        from edgeship.data.specs import example_tensors, with_notes
        from edgeship.frontends.torchscript.module import Scripted, split_arguments
        from edgeship.frontends.torchscript.script import read_script
        from edgeship.program.export import make_program
        from edgeship.program.program import REMARK

        script = read_script(model.path)
        taken, chosen = split_arguments(script, *split_inputs(self.inputs))
        specs = with_notes(taken, self.notes)
        made = Scripted(script, [spec.name for spec in taken], chosen)
        note = f"{self.name}: {model.path.name}"
        program = make_program(
            made.module,
            specs,
            example_tensors(specs),
            call=made.call,
            output_names=self.outputs,
            note=note,
            cut=self.cut,
        )
        remarks = [f"input {name} is fixed at {value}" for name, value in chosen.items()]
        if made.assigned:
            names = ", ".join(list(made.assigned)[:6])
            remarks.append(f"forward changes {names}: each call of an artifact begins with the values in the file")
        history = (*program.record.history, *(f"{REMARK}{remark}" for remark in remarks))
        program = replace(program, record=replace(program.record, history=history))
        program.save(ctx.folder / "program")
        return TorchModel(ctx.folder / "program", program.signature)
