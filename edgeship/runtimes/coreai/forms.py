"""Which encodings Core AI holds; asked while planning and again while lowering.

Every form that is not refused was written, read back and run (tests/lowering/coreai). Some of them Apple's own
converter (coreai-torch 0.4.3) never writes, though the dialect describes them and the runtime computes them: palettes
of 3 bits, and zeros left out of palettes and of integers below 8 bits.
"""

from __future__ import annotations

from edgeship.core.inventory import WeightOp
from edgeship.core.runtimes import ActivationMode
from edgeship.core.weights import Affine, Encoding, Float, Sparse


def refusal(op: WeightOp, encoding: Encoding, activations: ActivationMode) -> str:
    """Empty when Core AI holds this weight exactly; else why not, and what it has instead."""
    if activations == "int16":
        return "Core AI refuses int16 activations"
    if activations == "dynamic":
        return "Core AI has no dynamic activations from torch"
    if isinstance(encoding, Float):
        return ""
    if op == "other":
        return "only the weights of layers are stored in fewer bits than a float"
    inner = encoding.inner if isinstance(encoding, Sparse) else encoding
    if isinstance(encoding, Sparse) and isinstance(inner, Affine) and not inner.symmetric:
        return "zeros of a sparse weight need a symmetric grid"
    if isinstance(inner, Affine) and inner.granularity == "group" and op in ("depthwise_conv", "conv_transpose"):
        return "groups of input channels exist for linear layers, convolutions and embeddings; use scales per channel"
    return ""


def container_bits(encoding: Encoding) -> int:
    """Bits of one weight in the file: there are no 3-bit integers, and 4 bits hold them exactly."""
    inner = encoding.inner if isinstance(encoding, Sparse) else encoding
    return 4 if isinstance(inner, Affine) and inner.bits == 3 else encoding.bits


def resident_bits(encoding: Encoding) -> int:
    """Bits a weight takes in memory while the Neural Engine runs, as far as is known; the larger where it is not.

    Core AI decompresses when it loads or as it runs, and does not say which; the Neural Engine is the one that takes
    palettes and scales per channel as they are from Core ML. Nothing is known of scales per group, nor of zeros.
    """
    if isinstance(encoding, Sparse) or (isinstance(encoding, Affine) and encoding.granularity == "group"):
        return 16
    return container_bits(encoding)
