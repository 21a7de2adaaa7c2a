"""load/onnx: an ONNX file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from edgeship.core.model import Source, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import Request
from edgeship.data.specs import parse_inputs
from edgeship.errors import UsageError


@dataclass(frozen=True)
class LoadOnnx(Pass):
    """Bring an ONNX file into torch, so that it can go to every runtime."""

    name: ClassVar[str] = "load/onnx"
    tools: ClassVar[tuple[str, ...]] = ("torch", "onnx")

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Takes ``.onnx``; ``--input`` gives sizes to dynamic dimensions."""
        if request.source.form != "onnx":
            return Skip(f"{request.source.reference} is no ONNX file")
        load = request.load
        return cls(tuple(load["inputs"]), tuple(load["outputs"]), dict(load["notes"]))

    def confirm(self, request: Request) -> None:
        """Refuse inputs that nobody can read before anything is imported."""
        parse_inputs(self.inputs)

    def run(self, model: Source, ctx: Context) -> TorchModel:
        """Import the file and bring it into normal form."""
        from edgeship.core.model import NUMPY_DTYPES, TensorSpec
        from edgeship.data.specs import example_tensors, with_notes
        from edgeship.frontends.onnx.importer import import_onnx
        from edgeship.frontends.reads import recorded_reads
        from edgeship.program.export import make_program

        given = {spec.name: spec for spec in parse_inputs(self.inputs)}
        # External data may go by any name, which only the file knows.
        with recorded_reads() as reads:
            imported = import_onnx(model.path, sizes={name: spec.shape for name, spec in given.items()})
        short = {name: code for code, name in NUMPY_DTYPES.items()}
        for name, spec in given.items():
            found = next((item for item in imported.inputs if item.name == name), None)
            if found is None:
                known = ", ".join(item.name for item in imported.inputs)
                raise UsageError(f"{model.path.name} has no input {name}", fix=f"it has {known}")
            if short.get(found.dtype) != spec.dtype:
                raise UsageError(f"input {name} is {found.dtype}, not {spec.dtype}", fix=f"write {short[found.dtype]}")
        specs = with_notes(
            [TensorSpec(item.name, short[item.dtype], tuple(item.shape)) for item in imported.inputs],  # type: ignore[arg-type]
            self.notes,
        )
        names = self.outputs or [item.name for item in imported.outputs]
        note = f"{self.name}: {model.path.name}, opset {imported.opset}"
        program = make_program(imported.module, specs, example_tensors(specs), output_names=names, note=note)
        program.save(ctx.folder / "program")
        (ctx.folder / "dependencies.json").write_text(json.dumps(reads.digests()), encoding="utf-8")
        return TorchModel(ctx.folder / "program", program.signature)
