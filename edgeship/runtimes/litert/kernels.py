"""What LiteRT's kernels hold exactly: one row an operator and encoding, as measured.

The refusals are not pedantry: most of these cells load, run, and answer wrongly without a word.
"""

from __future__ import annotations

from typing import ClassVar

from edgeship.core.encodings.family import Encoding
from edgeship.core.forms import STATIC_MODES, ActivationMode, Form, Forms, Lacks
from edgeship.core.inventory import WeightOp
from edgeship.core.weights import MXFP4, Affine, Float, Palette, Sparse

# Operators whose integer weights reach the file. A transposed convolution is always dequantized first.
_STORED: tuple[WeightOp, ...] = ("linear", "conv", "depthwise_conv", "conv_transpose", "embedding", "recurrent")
GROUP_SIZES = (32, 64, 128)
# Depthwise convolutions of 8 bits and others of 4 have kernels too, which take two to four times as long as float.
HYBRID_CONVOLUTION = ("conv", 8)


class Floats(Form[Float]):
    """Constants; float16 is dequantized to float32."""

    family: ClassVar[type[Encoding]] = Float
    how: ClassVar[str] = "FLOAT16 and DEQUANTIZE"

    def refusal(self, op: WeightOp, encoding: Float, activations: ActivationMode) -> str:
        """What stands among static activations lies on a grid."""
        if op == "other" and encoding.bits == 32 and activations in STATIC_MODES:
            return "constants beside static activations are stored on a grid like theirs"
        return ""

    def scale_bits(self, encoding: Float) -> int:
        """There are none."""
        return 0

    def resident_bits(self, op: WeightOp, encoding: Float, activations: ActivationMode) -> int:
        """Computed in float32."""
        return 32


class Integers(Form[Affine]):
    """Tensors of integers with scales."""

    family: ClassVar[type[Encoding]] = Affine
    how: ClassVar[str] = (
        "INT8, INT4 and INT2 tensors with scales, read by the kernel or by DEQUANTIZE; groups as BlockwiseQuantization"
    )

    def refusal(self, op: WeightOp, encoding: Affine, activations: ActivationMode) -> str:
        """Empty when LiteRT holds this weight exactly and computes with it safely; else why not."""
        if not encoding.symmetric:
            return "its kernels ignore zero points of weights"
        if op not in _STORED:
            return "only weights of linear layers, convolutions and embeddings are kept in integers"
        if activations in STATIC_MODES:
            return self._static_refusal(op, encoding, activations)
        if encoding.granularity == "group":
            return self._group_refusal(op, encoding, activations)
        return ""

    def container_bits(self, op: WeightOp, encoding: Affine) -> int:
        """Bits of one weight in the file: the format has no 3-bit integers, and 4 bits hold them exactly."""
        return 4 if encoding.bits == 3 else encoding.bits

    def scale_bits(self, encoding: Affine) -> int:
        """Scales of blocks are float16 in the file; others float32, each with a zero point of 64 bits beside it."""
        return 16 if encoding.granularity == "group" else 32 + 64

    def resident_bits(self, op: WeightOp, encoding: Affine, activations: ActivationMode) -> int:
        """Bits of one weight while the model runs: 32 where a DEQUANTIZE stands before the layer, which XNNPACK
        keeps."""
        bits = self.container_bits(op, encoding)
        # Recurrent layers are written out step by step, and stay in float among static activations.
        static = op != "recurrent" and (op != "conv_transpose" or bits == 8)
        hybrid = encoding.granularity == "channel" and (op, bits) == HYBRID_CONVOLUTION
        computed = {
            "float": op == "embedding",
            "dynamic": op in ("linear", "embedding", "recurrent") or hybrid,
            "int8": static,
            "int16": static,
        }[activations]
        return bits if computed else 32

    def _static_refusal(self, op: WeightOp, encoding: Affine, activations: ActivationMode) -> str:
        if encoding.granularity == "group" and op != "embedding":
            return "its integer kernels have no groups; use scales per channel, or dynamic activations"
        if encoding.bits == 2 and op != "embedding":
            return "its integer kernels take weights of 8 and 4 bits"
        if op == "depthwise_conv" and self.container_bits(op, encoding) == 4 and activations == "int16":
            return "depthwise convolutions of 4-bit weights and 16-bit activations answer wrongly"
        return self._group_refusal(op, encoding, activations) if encoding.granularity == "group" else ""

    def _group_refusal(self, op: WeightOp, encoding: Affine, activations: ActivationMode) -> str:
        if op not in ("linear", "embedding"):
            return "groups of input channels exist for linear layers and embeddings only"
        if self.container_bits(op, encoding) != 4:
            return f"groups hold 4-bit integers only; {encoding.bits}-bit groups answer wrongly"
        if encoding.group_size not in GROUP_SIZES:
            return f"group sizes are {', '.join(map(str, GROUP_SIZES))}"
        if op == "linear" and activations == "float":
            return "dequantizing groups answers wrongly; use dynamic activations, or scales per channel"
        return ""


FORMS = Forms(
    (
        Floats(),
        Integers(),
        Lacks(Palette, "the format has no palettes; use int4 or int8"),
        Lacks(MXFP4, "the format has no floats of 4 bits; int4-g32 has as many"),
        Lacks(Sparse, "kernels read dense weights: it would be unpacked at load, and int8 is no larger in the file"),
    )
)
