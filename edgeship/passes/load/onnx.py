"""load/onnx: an ONNX file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgeship.core.model import NUMPY_DTYPES, Source, TensorSpec, TorchModel
from edgeship.core.names import clean_names
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import Request
from edgeship.data.specs import in_command, split_inputs
from edgeship.errors import SourceError, UsageError
from edgeship.program.suppression import CANDIDATES, check_candidates

if TYPE_CHECKING:
    from pathlib import Path

    from edgeship.frontends.onnx.importer import ImportedOnnx


@dataclass(frozen=True)
class LoadOnnx(Pass):
    """Bring an ONNX file into torch, so that it can go to every runtime.

    Args:
        inputs: sizes (``name:f32[1,3,224,224]``) and fixed values (``name=16000``), by the file's names or their clean
            spelling.
        cut: values of the graph at which it ends instead of at its outputs.
        candidates: how many boxes, best first, go into one non-maximum suppression.
    """

    name: ClassVar[str] = "load/onnx"
    tools: ClassVar[tuple[str, ...]] = ("torch", "onnx")

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    cut: tuple[str, ...] = ()
    candidates: int = CANDIDATES

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Takes ``.onnx``; ``--input`` gives sizes to dynamic dimensions."""
        if request.source.form != "onnx":
            return Skip(f"{request.source.reference} is not an ONNX file")
        load = request.load
        return cls(tuple(load["inputs"]), tuple(load["outputs"]), dict(load["notes"]), tuple(load.get("cut") or ()))

    def confirm(self, request: Request) -> None:
        """Refuse inputs that nobody can read before anything is imported."""
        check_candidates(self.candidates)
        split_inputs(self.inputs)

    def run(self, model: Source, ctx: Context) -> TorchModel:
        """Import the file and bring it into normal form."""
        from edgeship.data.specs import example_tensors, with_notes
        from edgeship.frontends.onnx.importer import import_onnx
        from edgeship.frontends.reads import recorded_reads
        from edgeship.program.export import make_program
        from edgeship.program.given import take_over
        from edgeship.program.program import REMARK

        specs, fixed = split_inputs(self.inputs)
        # External data may go by any name, which only the file knows.
        with recorded_reads() as reads:
            imported = import_onnx(
                model.path,
                sizes={spec.name: spec.shape for spec in specs},
                values={item.name: item.values for item in fixed},
                cut=self.cut,
                candidates=self.candidates,
            )
        short = {name: code for code, name in NUMPY_DTYPES.items()}
        for spec in specs:
            _check_dtype(spec, imported)
        _check_inputs(model.path, imported)
        named = with_notes(
            [
                TensorSpec(item.name, short[item.dtype], item.shape)  # type: ignore[arg-type]
                for item in imported.inputs
            ],
            self.notes,
        )
        own = [item.name for item in imported.outputs]
        note = f"{self.name}: {model.path.name}, opset {imported.opset}"
        program = make_program(
            imported.module, named, example_tensors(named), output_names=self.outputs, own_names=own, note=note
        )
        program = take_over(program, imported.encoded, dynamic=imported.is_dynamic)
        remarks = tuple(f"{REMARK}{remark}" for remark in imported.remarks)
        program = replace(program, record=replace(program.record, history=(*program.record.history, *remarks)))
        program.save(ctx.folder / "program")
        (ctx.folder / "dependencies.json").write_text(json.dumps(reads.digests()), encoding="utf-8")
        return TorchModel(ctx.folder / "program", program.signature)


def _check_inputs(path: Path, imported: ImportedOnnx) -> None:
    """Refuse inputs of a type that no artifact takes."""
    for item in imported.inputs:
        if item.dtype not in NUMPY_DTYPES.values():
            raise SourceError(
                f"input {item.name} of {path.name} holds {item.dtype}, which no runtime takes",
                fix=f"fix its value with {in_command(item.name, '=VALUE')}, or export it as float32 or int32",
            )


def _check_dtype(spec: TensorSpec, imported: ImportedOnnx) -> None:
    """Refuse a type that is neither the file's nor what it becomes in the artifacts."""
    names = [item.name for item in imported.inputs]
    clean = clean_names(names, "input")
    found = next(item for item, other in zip(imported.inputs, clean, strict=True) if spec.name in (item.name, other))
    taken = {found.dtype, found.declared}
    if spec.numpy_dtype not in taken:
        short = {name: code for code, name in NUMPY_DTYPES.items()}
        raise UsageError(
            f"input {spec.name} is {found.declared}, not {spec.dtype}", fix=f"write {short.get(found.dtype, 'f32')}"
        )
