"""Which encodings Core AI holds; asked while planning.

Every form that is not refused was written, read back and run (tests/lowering/coreai). Some of them Apple's own
converter (coreai-torch 0.4.3) never writes, though the dialect describes them and the runtime computes them: palettes
of 3 bits, and zeros left out of palettes and of integers below 8 bits.
"""

from __future__ import annotations

from typing import ClassVar

from edgeship.core.encodings.family import Encoding
from edgeship.core.forms import Forms
from edgeship.core.inventory import WeightOp
from edgeship.core.weights import MXFP4, Affine, Sparse
from edgeship.runtimes import apple


def container_bits(encoding: Encoding) -> int:
    """Bits of one weight in the file: there are no 3-bit integers, and 4 bits hold them exactly."""
    inner = encoding.dense
    return 4 if isinstance(inner, Affine) and inner.bits == 3 else encoding.bits


class Integers(apple.Integers):
    """Integers of 2, 4 and 8 bits."""

    how: ClassVar[str] = "constexpr_blockwise_shift_scale"

    def container_bits(self, op: WeightOp, encoding: Affine) -> int:
        """Four bits for 3-bit integers."""
        return container_bits(encoding)


class Palettes(apple.Palettes):
    """Tables for groups of output channels."""

    how: ClassVar[str] = "lut_to_dense"


class Microscaled(apple.Microscaled):
    """Core AI's own types of both."""

    how: ClassVar[str] = "f4E2M1FN with f8E8M0FNU scales in constexpr_blockwise_shift_scale"

    def scale_bits(self, encoding: MXFP4) -> int:
        """A scale is an exponent of 8 bits."""
        return 8


class Zeros(apple.Zeros):
    """Zeros left out of any of these."""

    how: ClassVar[str] = "sparse_to_dense, joined with the others"

    def container_bits(self, op: WeightOp, encoding: Sparse) -> int:
        """Four bits for 3-bit integers."""
        return container_bits(encoding)


FORMS = Forms((apple.Floats(), Integers(), Palettes(), Microscaled(), Zeros()))
