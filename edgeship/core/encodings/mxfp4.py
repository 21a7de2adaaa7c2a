"""MXFP4: floating point numbers of four bits that share a power of two in blocks of 32.

OCP Microscaling Formats (MX) Specification 1.0: an element is E2M1 (a sign, two bits of exponent, one of mantissa:
0, 0.5, 1, 1.5, 2, 3, 4 and 6), a block's scale E8M0 (an exponent with bias 127, no sign and no mantissa).

Rules for the numbers beside those of `edgeship.core.weights`: a scale that is decided here lies in 2**-13 .. 2**13, so
that every number of the weight is zero or a normal float16, and zero has one code, 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeship.core.encodings.affine import Affine
from edgeship.core.encodings.family import Encoding, expand_blocks, packed_bytes
from edgeship.errors import EncodingError, WeightsError

if TYPE_CHECKING:
    from edgeship.core.encodings.family import Array
    from edgeship.core.inventory import WeightUse

BLOCK = 32
BIAS = 127
# Of the codes 0 to 7; a code with bit 3 set is the negative of the same number.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NUMBERS = (*MAGNITUDES, *(-number for number in MAGNITUDES))
# Twice the numbers: integers, for formats that have no such floats.
DOUBLED = tuple(int(2 * number) for number in NUMBERS)
# Exponent of the largest element, 6 = 1.5 * 2**2.
LARGEST_EXPONENT = 2
LOWEST, HIGHEST = -13, 13
NOT_A_NUMBER = 255


@dataclass(frozen=True)
class MXFP4(Encoding):
    """E2M1 elements, one E8M0 scale for 32 input channels of an output channel."""

    kind: ClassVar[str] = "mxfp4"
    examples: ClassVar[tuple[str, ...]] = ("mxfp4",)

    @property
    def bits(self) -> int:
        """Four."""
        return 4

    @classmethod
    def named(cls, text: str) -> MXFP4 | None:
        """``mxfp4``."""
        return cls() if text == "mxfp4" else None

    @property
    def short_name(self) -> str:
        """``mxfp4``."""
        return "mxfp4"

    def __str__(self) -> str:
        return "mxfp4"

    @property
    def rows_alone(self) -> bool:
        """Blocks lie within them."""
        return True

    def fitted(self, use: WeightUse) -> Encoding:
        """Blocks are for linear layers and embeddings whose input channels they divide; other weights have int8, a
        scale a channel: the family has no larger blocks."""
        if use.op in ("linear", "embedding") and use.shape[1] % BLOCK == 0:
            return self
        return Affine(8)

    def shared_bits(self, use: WeightUse, container_bits: int, scale_bits: int) -> int:
        """A scale a block."""
        return use.elements // BLOCK * scale_bits

    def rebuild(self, arrays: dict[str, Array]) -> MXFP4Tensor:
        """A tensor from ``elements`` and ``exponents``."""
        return MXFP4Tensor(arrays["elements"], arrays["exponents"])

    def encode(self, weight: Array, *, axis: int = 0, clip: bool = False, name: str = "weight") -> MXFP4Tensor:
        """Round to the nearest element, ties to even, numbers beyond the largest one to it (specification, 6.3).

        Args:
            weight: ``[out, in, ...]`` with 32 dividing ``in``. axis: of output channels, 0.
            clip: of the specification's exponent and its neighbours the one with the smallest squared error.

        Raises:
            EncodingError: blocks do not divide the input channels. WeightsError: not finite, or beyond float16.
        """
        import numpy as np

        if axis != 0 or weight.ndim < 2 or weight.shape[1] % BLOCK:
            raise EncodingError(f"blocks of {BLOCK} do not divide {name} of shape {weight.shape}", fix="use int8")
        largest = float(np.abs(weight).max(initial=0.0))
        if not np.isfinite(largest):
            raise WeightsError(f"{name} holds NaN or infinity", fix="train or export the model again")
        if largest > MAGNITUDES[-1] * 2.0**HIGHEST:
            raise WeightsError(f"{name} is too large for float16", fix="scale the layer, or keep it in float32")
        # [out, in, ...] -> [out, in / 32, 32, ...]
        blocks = weight.reshape(weight.shape[0], -1, BLOCK, *weight.shape[2:]).astype(np.float32)
        exponents = _exponents(blocks)
        if clip:
            exponents = _least_error(blocks, exponents)
        elements = nearest(blocks / np.exp2(np.expand_dims(exponents, 2), dtype=np.float32))
        return MXFP4Tensor(elements.reshape(weight.shape), (exponents + BIAS).astype(np.uint8))


@dataclass(frozen=True, eq=False)
class MXFP4Tensor:
    """A weight in MXFP4.

    Args:
        elements: uint8, the weight's own shape, one code of four bits an element, not packed.
        exponents: uint8, E8M0 with bias 127, ``[out, in / 32, ...]``: one for 32 elements along axis 1.
    """

    elements: Array
    exponents: Array

    def __post_init__(self) -> None:
        wanted = (*self.shape[:1], self.shape[1] // BLOCK, *self.shape[2:]) if len(self.shape) > 1 else ()
        if self.exponents.shape != wanted or self.shape[1] % BLOCK:
            raise EncodingError(
                f"exponents of shape {self.exponents.shape} do not serve a weight of shape {self.shape}",
                fix=f"give one for {BLOCK} elements along axis 1",
            )
        if (self.exponents == NOT_A_NUMBER).any():
            raise EncodingError("a scale of MXFP4 is not a number", fix="export the model again")

    @property
    def encoding(self) -> MXFP4:
        """The only one of its family."""
        return MXFP4()

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own shape."""
        return tuple(self.elements.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes of packed elements, and one a block."""
        return packed_bytes(int(self.elements.size), 4) + int(self.exponents.size)

    @property
    def scale(self) -> Array:
        """Scales as float32, of the shape of ``exponents``. All are exact but the lowest, 2**-127, a subnormal."""
        import numpy as np

        scales: Array = np.ldexp(np.float32(1), self.exponents.astype(np.int32) - BIAS)
        return scales

    @property
    def fits_float16(self) -> bool:
        """Whether every number of it is zero or a normal float16, and half of every scale too."""
        return bool(((self.exponents >= LOWEST + BIAS) & (self.exponents <= HIGHEST + BIAS)).all())

    def dequantize(self) -> Array:
        """The weight in float32, in its own shape: ``element * scale``."""
        import numpy as np

        values: Array = np.array(NUMBERS, np.float32)[self.elements] * expand_blocks(self.scale, self.shape)
        return values

    def arrays(self) -> dict[str, Array]:
        """What goes into a safetensors file, by role."""
        return {"elements": self.elements, "exponents": self.exponents}


def nearest(values: Array) -> Array:
    """Codes of the elements nearest to ``values``, of any shape; ties to the even code, beyond the largest to it."""
    import numpy as np

    sizes = np.abs(values)
    middles = (np.array(MAGNITUDES[1:], np.float32) + np.array(MAGNITUDES[:-1], np.float32)) / 2
    codes = np.searchsorted(middles, sizes, side="left").astype(np.uint8)
    tie = sizes == middles[np.minimum(codes, len(middles) - 1)]
    codes += (tie & (codes % 2 == 1)).astype(np.uint8)
    negative = (values < 0) & (codes > 0)
    codes[negative] += 8
    return codes


def _exponents(blocks: Array) -> Array:
    """The specification's exponent of each block of ``[out, in / 32, 32, ...]``; that of a block of zeros is 0."""
    import numpy as np

    largest = np.abs(blocks).max(axis=2)
    exponents = np.frexp(largest)[1] - 1 - LARGEST_EXPONENT
    return np.where(largest > 0, np.clip(exponents, LOWEST, HIGHEST), 0)


def _least_error(blocks: Array, exponents: Array) -> Array:
    """Of each block's exponent, the one above and the one below, that with the smallest squared error."""
    import numpy as np

    numbers = np.array(NUMBERS, np.float32)
    best, least = exponents, np.full(exponents.shape, np.inf, np.float32)
    for step in (0, 1, -1):
        tried = np.clip(exponents + step, LOWEST, HIGHEST)
        scale = np.exp2(np.expand_dims(tried, 2), dtype=np.float32)
        error = np.square(numbers[nearest(blocks / scale)] * scale - blocks).sum(axis=2)
        better = error < least
        best, least = np.where(better, tried, best), np.where(better, error, least)
    return best
