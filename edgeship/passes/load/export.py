"""load/export: a torch.export .pt2 archive."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgeship.core.model import Source, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import Request
from edgeship.errors import SourceError, UnsafeSourceError
from edgeship.program.suppression import CANDIDATES, check_candidates

if TYPE_CHECKING:
    from pathlib import Path

    from torch.export import ExportedProgram


@dataclass(frozen=True)
class LoadExport(Pass):
    """Read a torch.export .pt2 archive, without running what it holds.

    Args:
        trusted: the user said ``--trust``: torch loads the file, which may run code, where our reader refuses it.
        cut: where the model ends instead of at its outputs: nodes of its graph, or modules that it was traced from.
        candidates: how many boxes, best first, go into one non-maximum suppression.
    """

    name: ClassVar[str] = "load/export"
    tools: ClassVar[tuple[str, ...]] = ("torch",)

    outputs: tuple[str, ...] = ()
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    trusted: bool = False
    cut: tuple[str, ...] = ()
    candidates: int = CANDIDATES

    decided: ClassVar[dict[str, str]] = {"trusted": "--trust"}

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Takes ``.pt2``."""
        if request.source.form != "export":
            return Skip(f"{request.source.reference} is not a torch.export archive")
        load = request.load
        return cls(tuple(load["outputs"]), dict(load["notes"]), bool(load.get("trusted")), tuple(load.get("cut") or ()))

    def confirm(self, request: Request) -> None:
        """Refuse a number of candidates that no suppression can have."""
        check_candidates(self.candidates)

    def run(self, model: Source, ctx: Context) -> TorchModel:
        """Load the archive and bring it into normal form; shapes and examples are the archive's own."""
        from edgeship.frontends.exported import program_of_exported

        exported = self._read(model.path)
        program = program_of_exported(
            exported,
            str(model.path),
            self.outputs,
            self.notes,
            note=self.name,
            cut=self.cut,
            candidates=self.candidates,
        )
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
