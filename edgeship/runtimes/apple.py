"""What Core ML and Core AI have in common: which stored weights they hold, and what the Neural Engine keeps of them."""

from __future__ import annotations

from edgeship.core.inventory import WeightOp
from edgeship.core.weights import Affine, Encoding, Float, Sparse


def weight_refusal(op: WeightOp, encoding: Encoding) -> str:
    """Empty when both hold this weight exactly, whatever the activations are; else why not."""
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


def resident_bits(encoding: Encoding, container_bits: int) -> int:
    """Bits a weight takes in memory while the Neural Engine runs, as far as is known; the larger where it is not.

    Since iOS 17 palettes, and integers with one scale a tensor or channel, are decompressed piece by piece as they are
    used. Gains in memory from scales per group are promised for the GPU alone, and nothing is said of zeros. Core AI
    does not say when it decompresses; it is taken to do as Core ML does.

    Args:
        container_bits: of one weight in the file.
    """
    if isinstance(encoding, Sparse) or (isinstance(encoding, Affine) and encoding.granularity == "group"):
        return 16
    return container_bits
