"""What LiteRT's kernels hold exactly: one row an operator and encoding, as measured.

The refusals are not pedantry: most of these cells load, run, and answer wrongly without a word.
"""

from __future__ import annotations

from edgeship.core.inventory import WeightOp
from edgeship.core.runtimes import ActivationMode
from edgeship.core.weights import Affine, Encoding, Float, Palette, Sparse

# Operators whose integer weights reach the file. A transposed convolution is always dequantized first.
_STORED: tuple[WeightOp, ...] = ("linear", "conv", "depthwise_conv", "conv_transpose", "embedding")
GROUP_SIZES = (32, 64, 128)


def refusal(op: WeightOp, encoding: Encoding, activations: ActivationMode) -> str:
    """Empty when LiteRT holds this weight exactly and computes with it safely; else why not."""
    if isinstance(encoding, Float):
        if op == "other" and encoding.bits == 32 and activations in ("int8", "int16"):
            return "constants beside static activations are stored on a grid like theirs"
        return ""
    if isinstance(encoding, Palette):
        return "the format has no palettes; use int4 or int8"
    if isinstance(encoding, Sparse):
        return "kernels read dense weights: it would be unpacked at load, and int8 is no larger in the file"
    if not isinstance(encoding, Affine):
        return "the format has integers with scales and floats, nothing else"
    if not encoding.symmetric:
        return "its kernels ignore zero points of weights"
    if op not in _STORED:
        return "only weights of linear layers, convolutions and embeddings are kept in integers"
    if activations in ("int8", "int16"):
        return _static_refusal(op, encoding, activations)
    if encoding.granularity == "group":
        return _group_refusal(op, encoding, activations)
    return ""


def container_bits(encoding: Encoding) -> int:
    """Bits of one weight in the file: the format has no 3-bit integers, and 4 bits hold them exactly."""
    return 4 if isinstance(encoding, Affine) and encoding.bits == 3 else encoding.bits


def resident_bits(op: WeightOp, encoding: Encoding, activations: ActivationMode) -> int:
    """Bits of one weight while the model runs: 32 where a DEQUANTIZE stands before the layer, which XNNPACK keeps."""
    if isinstance(encoding, Float) or not isinstance(encoding, Affine):
        return 32
    bits = container_bits(encoding)
    computed = {
        "float": op == "embedding",
        "dynamic": op in ("linear", "embedding")
        or (encoding.granularity == "channel" and (op, bits) == HYBRID_CONVOLUTION),
        "int8": op != "conv_transpose" or bits == 8,
        "int16": op != "conv_transpose" or bits == 8,
    }[activations]
    return bits if computed else 32


# Depthwise convolutions of 8 bits and others of 4 have kernels too, which take two to four times as long as float.
HYBRID_CONVOLUTION = ("conv", 8)


def _static_refusal(op: WeightOp, encoding: Affine, activations: ActivationMode) -> str:
    if encoding.granularity == "group" and op != "embedding":
        return "its integer kernels have no groups; use scales per channel, or dynamic activations"
    if encoding.bits == 2 and op != "embedding":
        return "its integer kernels take weights of 8 and 4 bits"
    if op == "depthwise_conv" and container_bits(encoding) == 4 and activations == "int16":
        return "depthwise convolutions of 4-bit weights and 16-bit activations answer wrongly"
    return _group_refusal(op, encoding, activations) if encoding.granularity == "group" else ""


def _group_refusal(op: WeightOp, encoding: Affine, activations: ActivationMode) -> str:
    if op not in ("linear", "embedding"):
        return "groups of input channels exist for linear layers and embeddings only"
    if container_bits(encoding) != 4:
        return f"groups hold 4-bit integers only; {encoding.bits}-bit groups answer wrongly"
    if encoding.group_size not in GROUP_SIZES:
        return f"group sizes are {', '.join(map(str, GROUP_SIZES))}"
    if op == "linear" and activations == "float":
        return "dequantizing groups answers wrongly; use dynamic activations, or scales per channel"
    return ""
