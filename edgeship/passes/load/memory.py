"""load/memory: a module or an exported program that lies in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from edgeship.core.model import Source, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import Request
from edgeship.program.suppression import CANDIDATES


@dataclass(frozen=True)
class LoadMemory(Pass):
    """Take a model from memory, which was exported when it was given.

    Args:
        candidates: how many boxes, best first, went into one non-maximum suppression.
    """

    name: ClassVar[str] = "load/memory"
    tools: ClassVar[tuple[str, ...]] = ("torch",)

    candidates: int = CANDIDATES

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Takes what was given in Python as an object."""
        if request.source.form != "memory":
            return Skip(f"{request.source.reference} is not in memory")
        return cls()

    def run(self, model: Source, ctx: Context) -> TorchModel:
        """Write the program; its digest was taken over graph and weights."""
        from edgeship.program.program import TorchProgram

        program = model.held
        assert isinstance(program, TorchProgram)
        program.save(ctx.folder / "program")
        return TorchModel(ctx.folder / "program", program.signature)
