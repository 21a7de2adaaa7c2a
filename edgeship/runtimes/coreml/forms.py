"""Which encodings Core ML holds, by version of iOS; asked while planning and again while lowering.

The versions are those of Apple's guide to Core ML Tools 9.0, "What's New" of its optimization chapter; every form that
is not refused was written, read back and evaluated (tests/lowering/coreml).
"""

from __future__ import annotations

from edgeship.core.inventory import WeightOp
from edgeship.core.runtimes import ActivationMode
from edgeship.core.weights import Affine, Encoding, Float, Palette, Sparse
from edgeship.runtimes.apple import weight_refusal

# Block scales, 3-bit and grouped palettes, and zeros left out of integers or palettes all came with this version.
IOS18 = 18
# Before it: Core ML has no 3-bit indices.
OLD_PALETTES = (1, 2, 4, 6, 8)


def refusal(op: WeightOp, encoding: Encoding, activations: ActivationMode) -> str:
    """Empty when Core ML of iOS 18 and later holds this weight exactly; else why not."""
    if activations == "int16":
        return "Core ML quantizes activations to int8 only"
    if activations == "dynamic":
        return "Core ML has no dynamic activations"
    if op == "other" and activations == "int8":
        return "a constant among static activations is stored on their grid"
    return weight_refusal(op, encoding)


def refusal_before_ios18(encoding: Encoding) -> str:
    """Empty when Core ML of iOS 16 and 17 holds the encoding; else what it has instead."""
    if isinstance(encoding, Float):
        return ""
    palettes = f"palettes of {', '.join(map(str, OLD_PALETTES))} bits per tensor"
    if isinstance(encoding, Sparse):
        return "" if isinstance(encoding.inner, Float) else "zeros are left out of floats only"
    if isinstance(encoding, Palette):
        fits = encoding.bits in OLD_PALETTES and encoding.group_channels is None
        return "" if fits else f"it has {palettes}"
    fits = isinstance(encoding, Affine) and encoding.bits == 8 and encoding.granularity != "group"
    return "" if fits else f"it has int8 per tensor or channel, and {palettes}"


def container_bits(op: WeightOp, encoding: Encoding) -> int:
    """Bits of one weight in the file.

    There are no integers of 2 and 3 bits; they are indices into a list of all of them. Before iOS 26 Core ML needs that
    list, of 4 or 8 bytes, once for every scale: more than it saves for a group or for the few weights of a depthwise
    channel. The order of operations that it needs does not exist for sparse weights. Those all stand in 4 bits.
    """
    inner = encoding.inner if isinstance(encoding, Sparse) else encoding
    if not isinstance(inner, Affine) or inner.bits >= 4:
        return encoding.bits
    short = inner.granularity == "group" or (op == "depthwise_conv" and inner.granularity == "channel")
    return 4 if short or isinstance(encoding, Sparse) else encoding.bits
