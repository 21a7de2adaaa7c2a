"""load/export: a torch.export .pt2 archive."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgeship.core.model import Source, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import Request
from edgeship.errors import SourceError, UnsafeSourceError

if TYPE_CHECKING:
    from pathlib import Path

    from torch.export import ExportedProgram


@dataclass(frozen=True)
class LoadExport(Pass):
    """Read a torch.export .pt2 archive, without running what it holds.

    Args:
        trusted: the user said ``--trust``: torch loads the file, which may run code, where our reader refuses it.
    """

    name: ClassVar[str] = "load/export"
    tools: ClassVar[tuple[str, ...]] = ("torch",)

    outputs: tuple[str, ...] = ()
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    trusted: bool = False

    decided: ClassVar[dict[str, str]] = {"trusted": "--trust"}

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Takes ``.pt2``."""
        if request.source.form != "export":
            return Skip(f"{request.source.reference} is no torch.export archive")
        load = request.load
        return cls(tuple(load["outputs"]), dict(load["notes"]), trusted=bool(load.get("trusted")))

    def run(self, model: Source, ctx: Context) -> TorchModel:
        """Load the archive and bring it into normal form; shapes and examples are the archive's own."""
        import torch

        from edgeship.compat.torch import leaves_of, structure_of, with_structure
        from edgeship.core.model import TensorSpec
        from edgeship.data.specs import with_notes
        from edgeship.program.export import dtype_of, make_program

        exported = self._read(model.path)
        for value in exported.range_constraints:
            raise SourceError(
                f"{model.path} was exported with the dynamic size {value}", fix="export it with fixed shapes"
            )
        if exported.example_inputs is None:
            raise SourceError(f"{model.path} holds no example inputs", fix="save it with torch.export.save as exported")
        args, kwargs = exported.example_inputs
        tensors = leaves_of((args, kwargs))
        names = exported.graph_signature.user_inputs
        specs = with_notes(
            [TensorSpec(str(n), dtype_of(t), tuple(t.shape)) for n, t in zip(names, tensors, strict=True)], self.notes
        )
        structure = structure_of((args, kwargs))

        def call(module: torch.nn.Module, *leaves: torch.Tensor) -> Any:
            positional, named = with_structure(leaves, structure)
            return module(*positional, **named)

        inner = exported.module(check_guards=False)
        # Exported modules refuse train() and eval(), and are in the latter already.
        setattr(inner, "eval", lambda: inner)  # noqa: B010
        setattr(inner, "train", lambda mode=True: inner)  # noqa: B010
        program = make_program(inner, specs, tensors, call=call, output_names=self.outputs, note=f"{self.name}")
        program.save(ctx.folder / "program")
        return TorchModel(ctx.folder / "program", program.signature)

    def _read(self, path: Path) -> ExportedProgram:
        import torch

        from edgeship.program.archive import read_archive

        try:
            return read_archive(path)
        except UnsafeSourceError:
            if not self.trusted:
                raise
        try:
            return torch.export.load(path)
        except Exception as error:  # whatever the file's own code raises
            reason = " ".join(str(error).split())[:200]
            raise SourceError(f"{path} is not a readable .pt2: {reason}", fix="export it again") from error
