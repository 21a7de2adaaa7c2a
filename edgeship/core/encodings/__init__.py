"""Encodings: how a weight can be stored, a file a family; and their short names, as profiles and ``--set`` write them.

    float16  int8  int8-tensor  int4-g32  int4-g32-asym  palette4  palette4-c8  sparse-int8

``-tensor`` one scale for all, ``-gN`` a scale for each N input channels, ``-asym`` with zero points, ``-cN`` a palette
for each N output channels. Without them: a scale a channel, a palette a tensor.
"""

from __future__ import annotations

from edgeship.core.encodings.families import encoding_named, examples, families
from edgeship.core.encodings.family import EncodedTensor, Encoding
from edgeship.core.encodings.sparse import without_zeros
from edgeship.core.inventory import WeightOp, WeightUse

__all__ = [
    "ENCODED_OPS", "EncodedTensor", "Encoding", "encoding_named", "examples", "families", "fitted", "short_name",
    "stored_bits", "without_zeros",
]  # fmt: skip

# Integers cost more than they save on the handful of numbers of a bias or a norm.
ENCODED_OPS: tuple[WeightOp, ...] = ("linear", "conv", "depthwise_conv", "conv_transpose", "embedding", "recurrent")


def short_name(encoding: Encoding) -> str:
    """The inverse of `encoding_named`."""
    return encoding.short_name


def fitted(encoding: Encoding, use: WeightUse) -> Encoding:
    """The encoding as one weight can take it (`Encoding.fitted`)."""
    return encoding.fitted(use)


def stored_bits(
    encoding: Encoding, use: WeightUse, container_bits: int, sparsity: float = 0.0, scale_bits: int = 16
) -> int:
    """Bits that one weight takes in a file, with its scales, tables and mask; `Runtime.stored_bits` knows its widths.

    Args:
        container_bits: of one number. sparsity: share of zeros left out. scale_bits: of one scale.
    """
    return encoding.stored_bits(use, container_bits, sparsity, scale_bits)
