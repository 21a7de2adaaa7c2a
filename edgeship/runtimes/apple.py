"""What Core ML and Core AI have in common: which stored weights they hold, and what the Neural Engine keeps of them.

In memory: since iOS 17 palettes, and integers with one scale a tensor or channel, are decompressed piece by piece as
they are used. Gains in memory from scales per group are promised for the GPU alone, and nothing is said of zeros; both
count as 16 bits. Core AI does not say when it decompresses; it is taken to do as Core ML does.
"""

from __future__ import annotations

from typing import ClassVar, assert_never

from edgeship.core.encodings.family import Encoding
from edgeship.core.forms import ActivationMode, Form
from edgeship.core.inventory import WeightOp
from edgeship.core.weights import MXFP4, Affine, Float, Palette, Sparse

DECOMPRESSED = 16
_FLOATS_ONLY = "only the weights of layers are stored in fewer bits than a float"


class Floats(Form[Float]):
    """Constants."""

    family: ClassVar[type[Encoding]] = Float
    how: ClassVar[str] = "float16 constants"


class Integers(Form[Affine]):
    """Integers that an operation scales."""

    family: ClassVar[type[Encoding]] = Affine

    def refusal(self, op: WeightOp, encoding: Affine, activations: ActivationMode) -> str:
        """Groups of input channels are for operators that sum over input channels."""
        if op == "other":
            return _FLOATS_ONLY
        if encoding.granularity == "group" and op in ("depthwise_conv", "conv_transpose"):
            return (
                "groups of input channels exist for linear layers, convolutions and embeddings; use scales per channel"
            )
        return ""

    def resident_bits(self, op: WeightOp, encoding: Affine, activations: ActivationMode) -> int:
        """As in the file, but for groups."""
        return DECOMPRESSED if encoding.granularity == "group" else self.container_bits(op, encoding)


class Palettes(Form[Palette]):
    """Indices that an operation looks up."""

    family: ClassVar[type[Encoding]] = Palette

    def refusal(self, op: WeightOp, encoding: Palette, activations: ActivationMode) -> str:
        """Every palette of a layer's weight is held."""
        return _FLOATS_ONLY if op == "other" else ""


class Microscaled(Form[MXFP4]):
    """Elements of four bits that an operation scales."""

    family: ClassVar[type[Encoding]] = MXFP4

    def refusal(self, op: WeightOp, encoding: MXFP4, activations: ActivationMode) -> str:
        """Blocks are of input channels, as groups are."""
        if op == "other":
            return _FLOATS_ONLY
        if op in ("depthwise_conv", "conv_transpose"):
            return "blocks of input channels exist for linear layers, convolutions and embeddings; use int8"
        return ""

    def resident_bits(self, op: WeightOp, encoding: MXFP4, activations: ActivationMode) -> int:
        """As groups."""
        return DECOMPRESSED


class Zeros(Form[Sparse]):
    """A mask, and the values inside it."""

    family: ClassVar[type[Encoding]] = Sparse

    def refusal(self, op: WeightOp, encoding: Sparse, activations: ActivationMode) -> str:
        """As the values inside, which must have a zero."""
        if op == "other":
            return _FLOATS_ONLY
        inner = encoding.inner
        match inner:
            case Float() | Palette():
                return ""
            case Affine():
                return (
                    Integers().refusal(op, inner, activations)
                    if inner.symmetric
                    else "zeros of a sparse weight need a symmetric grid"
                )
            case _:
                assert_never(inner)

    def resident_bits(self, op: WeightOp, encoding: Sparse, activations: ActivationMode) -> int:
        """Nothing is said of zeros."""
        return DECOMPRESSED
