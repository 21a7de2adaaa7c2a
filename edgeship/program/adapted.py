"""A program with LoRA matrices added to its weights: what an engine must answer while an adapter is active."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from edgeship.program.program import TorchProgram

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    Matrices = Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]


@dataclass
class AdaptedProgram(TorchProgram):
    """A program whose layers add an adapter's product to what they answer.

    Args:
        matrices: layer -> A ``[in, r]`` and B ``[r, out]``; added to its weight ``[out, in]``, float32.
    """

    matrices: Matrices = field(default_factory=dict)

    def weight(self, name: str) -> torch.Tensor:
        """One weight as the reference computes with it. [out, in] where an adapter changes it."""
        import torch

        value = super().weight(name)
        pair = self.matrices.get(name.removesuffix(".weight"))
        if pair is None:
            return value
        down, up = (torch.from_numpy(matrix) for matrix in pair)
        return value.float() + (down @ up).T


def adapted(program: TorchProgram, matrices: Matrices) -> AdaptedProgram:
    """The program while an adapter is active. Not for programs that are run weight by weight, or for tied weights."""
    return AdaptedProgram(**{item.name: getattr(program, item.name) for item in fields(program)}, matrices=matrices)
