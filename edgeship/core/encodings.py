"""The short names of encodings, as profiles and ``--set`` write them, and how an encoding fits one weight.

    float16  int8  int8-tensor  int4-g32  int4-g32-asym  palette4  palette4-c8  sparse-int8

``-tensor`` one scale for all, ``-gN`` a scale for each N input channels, ``-asym`` with zero points, ``-cN`` a palette
for each N output channels. Without them: a scale a channel, a palette a tensor.
"""

from __future__ import annotations

import dataclasses
import re

from edgeship.core.inventory import WeightOp, WeightUse
from edgeship.core.weights import Affine, Encoding, Float, Palette, Sparse
from edgeship.errors import UsageError

_NAME = re.compile(
    r"(?:float(?P<float>16|32)|int(?P<int>[2348])(?P<tensor>-tensor)?(?:-g(?P<group>\d+))?(?P<asym>-asym)?"
    r"|palette(?P<palette>[123468])(?:-c(?P<channels>\d+))?)"
)
EXAMPLES = "float16, int8, int4-g32, int4-g32-asym, palette4-c8"
# Integers cost more than they save on the handful of numbers of a bias or a norm.
ENCODED_OPS: tuple[WeightOp, ...] = ("linear", "conv", "depthwise_conv", "conv_transpose", "embedding")


def encoding_named(text: str) -> Encoding:
    """The encoding of a short name. Raises `UsageError` with examples for what is none."""
    if text.startswith("sparse-"):
        inner = encoding_named(text.removeprefix("sparse-"))
        if isinstance(inner, Sparse):
            raise UsageError(f'"{text}" is no encoding', fix=f"write sparse- before one of {EXAMPLES}")
        return Sparse(inner)
    found = _NAME.fullmatch(text)
    if found is None or (found["tensor"] and found["group"]):
        raise UsageError(f'"{text}" is no encoding', fix=f"write one like {EXAMPLES}")
    if found["float"]:
        return Float(int(found["float"]))
    if found["palette"]:
        return Palette(int(found["palette"]), int(found["channels"]) if found["channels"] else None)
    group = int(found["group"]) if found["group"] else None
    reach = "tensor" if found["tensor"] else "group" if group else "channel"
    return Affine(int(found["int"]), not found["asym"], reach, group)  # type: ignore[arg-type]


def short_name(encoding: Encoding) -> str:
    """The inverse of `encoding_named`."""
    if isinstance(encoding, Sparse):
        return f"sparse-{short_name(encoding.inner)}"
    if isinstance(encoding, Float):
        return f"float{encoding.bits}"
    if isinstance(encoding, Palette):
        return f"palette{encoding.bits}" + (f"-c{encoding.group_channels}" if encoding.group_channels else "")
    reach = {"tensor": "-tensor", "channel": "", "group": f"-g{encoding.group_size}"}[encoding.granularity]
    return f"int{encoding.bits}{reach}{'' if encoding.symmetric else '-asym'}"


def fitted(encoding: Encoding, use: WeightUse) -> Encoding:
    """The encoding as one weight can take it.

    Groups are for linear layers and embeddings whose input channels they divide; others get one scale a channel.
    Palettes whose channels do not divide the outputs, and those of transposed convolutions, become one a tensor.
    """
    if isinstance(encoding, Sparse):
        inner = fitted(encoding.inner, use)
        assert not isinstance(inner, Sparse)
        return Sparse(inner)
    if isinstance(encoding, Affine) and encoding.granularity == "group":
        size = encoding.group_size or 0
        if use.op not in ("linear", "embedding") or use.shape[1] % size:
            return dataclasses.replace(encoding, granularity="channel", group_size=None)
    if isinstance(encoding, Palette) and (use.channel_axis != 0 or use.shape[0] % (encoding.group_channels or 1)):
        return dataclasses.replace(encoding, group_channels=None)
    return encoding


def stored_bits(
    encoding: Encoding, use: WeightUse, container_bits: int, sparsity: float = 0.0, scale_bits: int = 16
) -> int:
    """Bits that one weight takes in a file, with its scales, tables and mask; `Runtime.stored_bits` knows its widths.

    Args:
        container_bits: of one number. sparsity: share of zeros left out. scale_bits: of one scale.
    """
    if isinstance(encoding, Sparse):
        kept = round(use.elements * (1 - sparsity))
        return use.elements + kept * container_bits + _side_bits(encoding.inner, use, container_bits, scale_bits)
    return use.elements * container_bits + _side_bits(encoding, use, container_bits, scale_bits)


def without_zeros(encoding: Encoding, use: WeightUse, sparsity: float) -> Encoding:
    """Sparse where leaving a pruned weight's zeros out takes fewer bytes than storing them; else as it is."""
    if isinstance(encoding, Sparse) or (isinstance(encoding, Affine) and not encoding.symmetric):
        return encoding
    sparse, bits = Sparse(encoding), encoding.bits
    smaller = stored_bits(sparse, use, bits, sparsity) < stored_bits(encoding, use, bits)
    return sparse if smaller else encoding


def _side_bits(encoding: Encoding, use: WeightUse, container_bits: int, scale_bits: int) -> int:
    if isinstance(encoding, Palette):
        tables = use.shape[0] // encoding.group_channels if encoding.group_channels else 1
        return tables * (16 << encoding.bits)
    if not isinstance(encoding, Affine) or not use.shape:
        return 0
    channels = use.shape[use.channel_axis]
    scales = {"tensor": 1, "channel": channels, "group": use.elements // (encoding.group_size or 1)}
    return scales[encoding.granularity] * (scale_bits + (0 if encoding.symmetric else container_bits))
