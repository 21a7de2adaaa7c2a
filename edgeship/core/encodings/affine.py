"""Integers with scales: a tensor, a channel or a group of input channels shares one."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from edgeship.core.encodings.family import Encoding, expand_blocks
from edgeship.errors import EncodingError

if TYPE_CHECKING:
    from edgeship.core.encodings.family import Array
    from edgeship.core.inventory import WeightUse


Granularity = Literal["tensor", "channel", "group"]
_NAME = re.compile(r"int(?P<bits>[2348])(?P<tensor>-tensor)?(?:-g(?P<group>\d+))?(?P<asym>-asym)?")


@dataclass(frozen=True)
class Affine(Encoding):
    """Integers with a scale: ``weight = scale * (value - zero_point)``.

    ``granularity`` says how far one scale reaches: the whole tensor, one output channel, or ``group_size``
    consecutive input channels of one output channel.
    """

    kind: ClassVar[str] = "affine"
    examples: ClassVar[tuple[str, ...]] = ("int8", "int4-g32", "int4-g32-asym")
    bits: int = 8
    symmetric: bool = True
    granularity: Granularity = "channel"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise EncodingError(f"int{self.bits} is not an encoding", fix="use 2, 3, 4 or 8 bits")
        if (self.granularity == "group") != (self.group_size is not None):
            raise EncodingError("a group size belongs to granularity group, and only to it", fix="give both or neither")

    @property
    def low(self) -> int:
        """Smallest stored integer."""
        return 1 - (1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        """Largest stored integer."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @classmethod
    def named(cls, text: str) -> Affine | None:
        """``int4``: a scale a channel; ``-tensor`` one for all, ``-g32`` one for 32 input channels, ``-asym`` with zero
        points."""
        found = _NAME.fullmatch(text)
        if found is None or (found["tensor"] and found["group"]):
            return None
        group = int(found["group"]) if found["group"] else None
        reach: Granularity = "group" if group else "channel"
        if found["tensor"]:
            reach = "tensor"
        return cls(int(found["bits"]), not found["asym"], reach, group)

    @property
    def short_name(self) -> str:
        """``int4-g32-asym``."""
        reach = {"tensor": "-tensor", "channel": "", "group": f"-g{self.group_size}"}[self.granularity]
        return f"int{self.bits}{reach}{'' if self.symmetric else '-asym'}"

    def __str__(self) -> str:
        reach = {"tensor": "per tensor", "channel": "per channel", "group": f"group {self.group_size}"}
        sign = "" if self.symmetric else " asymmetric"
        return f"int{self.bits} {reach[self.granularity]}{sign}"

    @property
    def wider(self) -> tuple[Affine, ...]:
        """The same with 3 and 4 bits; 8 have no need of groups."""
        return tuple(replace(self, bits=bits) for bits in (3, 4) if bits > self.bits)

    @property
    def rows_alone(self) -> bool:
        """All but one scale for the tensor."""
        return self.granularity != "tensor"

    def fitted(self, use: WeightUse) -> Affine:
        """Groups are for linear layers and embeddings whose input channels they divide; others get one scale a
        channel. Recurrent weights have 8 bits: what they lose comes back at every step."""
        if use.op == "recurrent" and self.bits < 8:
            reach: Granularity = "tensor" if self.granularity == "tensor" else "channel"
            return replace(self, bits=8, granularity=reach, group_size=None)
        if self.granularity != "group":
            return self
        if use.op in ("linear", "embedding") and use.shape[1] % (self.group_size or 1) == 0:
            return self
        return replace(self, granularity="channel", group_size=None)

    def shared_bits(self, use: WeightUse, container_bits: int, scale_bits: int) -> int:
        """Scales, and zero points of the integers' width."""
        if not use.shape:
            return 0
        channels = use.shape[use.channel_axis]
        scales = {"tensor": 1, "channel": channels, "group": use.elements // (self.group_size or 1)}
        return scales[self.granularity] * (scale_bits + (0 if self.symmetric else container_bits))

    def rebuild(self, arrays: dict[str, Array]) -> AffineTensor:
        """A tensor from ``values``, ``scale`` and, where it is asymmetric, ``zero_point``."""
        return AffineTensor(arrays["values"], arrays["scale"], arrays.get("zero_point"), self)


@dataclass(frozen=True, eq=False)
class AffineTensor:
    """A weight in integers with scales.

    Args:
        values: int8 (symmetric) or uint8 (asymmetric), the weight's own shape, one integer an element, not packed.
        scale: float32, same rank as ``values``; each axis is 1 or divides that axis, so that one scale covers a block.
        zero_point: same shape as ``scale`` and dtype of ``values``; None when symmetric.
        encoding: what was asked for; ``values`` stay inside its range.
    """

    values: Array
    scale: Array
    zero_point: Array | None
    encoding: Affine

    def __post_init__(self) -> None:
        ranks = {self.values.ndim, self.scale.ndim}
        if len(ranks) != 1 or any(n % s for n, s in zip(self.values.shape, self.scale.shape, strict=True)):
            raise EncodingError(
                f"scales of shape {self.scale.shape} do not tile a weight of shape {self.values.shape}",
                fix="give one scale a block, with the block dividing each axis",
            )
        if (self.zero_point is None) != self.encoding.symmetric:
            raise EncodingError("a zero point belongs to asymmetric encodings, and only to them")

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own shape."""
        return tuple(self.values.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes of packed integers, float16 scales and packed zero points."""
        packed = -(-int(self.values.size) * self.encoding.bits // 8)
        zeros = 0 if self.zero_point is None else -(-int(self.zero_point.size) * self.encoding.bits // 8)
        return packed + 2 * int(self.scale.size) + zeros

    def dequantize(self) -> Array:
        """The weight in float32, in its own shape: ``scale * (values - zero_point)``."""
        import numpy as np

        values = self.values.astype(np.float32)
        if self.zero_point is not None:
            values -= expand_blocks(self.zero_point, self.shape).astype(np.float32)
        result: Array = values * expand_blocks(self.scale, self.shape)
        return result

    def arrays(self) -> dict[str, Array]:
        """What goes into a safetensors file, by role."""
        arrays = {"values": self.values, "scale": self.scale}
        if self.zero_point is not None:
            arrays["zero_point"] = self.zero_point
        return arrays
