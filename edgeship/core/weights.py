"""Encoded weights: the integers, scales and palettes that compression decides and every runtime stores.

The families and their tensors lie in `edgeship.core.encodings`, a file each; here are their names in one place, and
the grids of activations.

Rules for the numbers (each runtime stores them exactly only if they hold):
  - scales per tensor and per channel lie on the float16 grid, scales per group on the bfloat16 grid inside float16's
    normal range, so that float16, bfloat16 and float32 files hold the same number;
  - symmetric integers use the narrow range (-127..127, -7..7), zero point 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeship.core.encodings.affine import Affine, AffineTensor, Granularity
from edgeship.core.encodings.family import EncodedTensor, Encoding, expand_blocks, same_numbers
from edgeship.core.encodings.floats import Float, FloatTensor
from edgeship.core.encodings.mxfp4 import MXFP4, MXFP4Tensor
from edgeship.core.encodings.palette import Palette, PaletteTensor
from edgeship.core.encodings.sparse import Dense, DenseTensor, Sparse, SparseTensor

if TYPE_CHECKING:
    from edgeship.core.encodings.family import Array as Array

__all__ = [
    "MXFP4",
    "ActivationEncoding",
    "Affine",
    "AffineTensor",
    "Dense",
    "DenseTensor",
    "EncodedTensor",
    "Encoding",
    "Float",
    "FloatTensor",
    "Granularity",
    "MXFP4Tensor",
    "Palette",
    "PaletteTensor",
    "Sparse",
    "SparseTensor",
    "expand_blocks",
    "rebuild",
    "same_numbers",
]  # fmt: skip


def rebuild(encoding: Encoding, arrays: dict[str, Array]) -> EncodedTensor:
    """The inverse of ``arrays()``: an encoded tensor from its encoding and its arrays by role."""
    return encoding.rebuild(arrays)


@dataclass(frozen=True)
class ActivationEncoding:
    """Static integers for one activation: ``value = scale * (integer - zero_point)``, per tensor.

    int8 is stored as it is; int16 is symmetric (zero point 0), because that is what LiteRT takes, and becomes
    uint16 with zero point 32768 where a runtime wants it unsigned: the same grid.
    """

    bits: int
    scale: float
    zero_point: int

    @property
    def low(self) -> int:
        """Smallest integer of the grid."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest integer of the grid."""
        return (1 << (self.bits - 1)) - 1
