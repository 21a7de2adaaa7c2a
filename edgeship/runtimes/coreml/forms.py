"""Which encodings Core ML holds, by version of iOS; asked while planning and again while lowering.

The versions are those of Apple's guide to Core ML Tools 9.0, "What's New" of its optimization chapter; every form that
is not refused was written, read back and evaluated (tests/lowering/coreml).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from edgeship.core.encodings.family import Encoding
from edgeship.core.forms import Forms
from edgeship.core.inventory import WeightOp
from edgeship.core.weights import MXFP4, Affine, Float, Palette, Sparse
from edgeship.runtimes import apple

# Block scales, 3-bit and grouped palettes, and zeros left out of integers or palettes all came with this version.
IOS18 = 18
# A list of integers can be looked up before it is scaled.
IOS26 = 26
# Before it: Core ML has no 3-bit indices.
OLD_PALETTES = (1, 2, 4, 6, 8)
_PALETTES = f"palettes of {', '.join(map(str, OLD_PALETTES))} bits per tensor"


class Floats(apple.Floats):
    """Constants, in every version."""

    def lacks(self, encoding: Float, system: int) -> str:
        """Nothing."""
        return ""


class Integers(apple.Integers):
    """Integers of 4 and 8 bits.

    There are none of 2 and 3 bits; they are indices into a list of all of them. Before iOS 26 Core ML needs that list,
    of 4 or 8 bytes, once for every scale: more than it saves for a group or for the few weights of a depthwise channel,
    where they stand in 4 bits.
    """

    how: ClassVar[str] = "constexpr_blockwise_shift_scale, with constexpr_lut_to_dense for 2 and 3 bits"

    def container_bits(self, op: WeightOp, encoding: Affine) -> int:
        """Four bits for some integers of fewer."""
        short = encoding.granularity == "group" or (op == "depthwise_conv" and encoding.granularity == "channel")
        return 4 if encoding.bits < 4 and short else encoding.bits

    def lacks(self, encoding: Affine, system: int) -> str:
        """Before iOS 18: 4 bits and groups."""
        if system >= IOS18 or (encoding.bits == 8 and encoding.granularity != "group"):
            return ""
        return f"it has int8 per tensor or channel, and {_PALETTES}"


class Palettes(apple.Palettes):
    """Tables for groups of output channels."""

    how: ClassVar[str] = "constexpr_lut_to_dense"

    def lacks(self, encoding: Palette, system: int) -> str:
        """Before iOS 18: 3 bits and groups."""
        fits = encoding.bits in OLD_PALETTES and encoding.group_channels is None
        return "" if fits or system >= IOS18 else f"it has {_PALETTES}"


class Microscaled(apple.Microscaled):
    """Elements as indices into a list of integers, scaled by powers of two.

    Before iOS 26 Core ML needs that list once for every scale: as many bytes as the elements themselves.
    """

    how: ClassVar[str] = "constexpr_lut_to_dense of uint4 into int8, then constexpr_blockwise_shift_scale (iOS 26)"

    def lacks(self, encoding: MXFP4, system: int) -> str:
        """Before iOS 26 it is larger than int8."""
        return "" if system >= IOS26 else "before iOS 26 it takes more bytes than int8, a scale a channel"


class Zeros(apple.Zeros):
    """Zeros left out of any of these."""

    how: ClassVar[str] = "constexpr_sparse_to_dense, joined with the others"

    def container_bits(self, op: WeightOp, encoding: Sparse) -> int:
        """Four bits for integers of fewer: the order of operations that a list of them needs does not exist here."""
        return max(encoding.bits, 4) if isinstance(encoding.inner, Affine) else encoding.bits

    def lacks(self, encoding: Sparse, system: int) -> str:
        """Before iOS 18: everything but floats inside."""
        fits = isinstance(encoding.inner, Float) or system >= IOS18
        return "" if fits else "zeros are left out of floats only"


ROWS = (Floats(), Integers(), Palettes(), Microscaled(), Zeros())
FORMS = Forms(ROWS)
_LACKS: dict[type[Encoding], Callable[[Any, int], str]] = {row.family: row.lacks for row in ROWS}


def lacking(encoding: Encoding, system: int) -> str:
    """Empty when Core ML of one version of iOS holds an encoding that later ones hold; else what it has instead."""
    stored = FORMS.in_the_file(encoding)
    return _LACKS[type(stored)](stored, system) if type(stored) in _LACKS else ""
