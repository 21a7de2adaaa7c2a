"""Palettes: a table of values, and an index a weight."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from edgeship.core.encodings.family import Encoding
from edgeship.errors import EncodingError

if TYPE_CHECKING:
    from edgeship.core.encodings.family import Array
    from edgeship.core.inventory import WeightUse


_NAME = re.compile(r"palette(?P<bits>[123468])(?:-c(?P<channels>\d+))?")


@dataclass(frozen=True)
class Palette(Encoding):
    """A look-up table of ``2**bits`` float16 values, and an index a weight.

    ``group_channels`` output channels (axis 0) share one table; None means one table for the whole tensor.
    """

    kind: ClassVar[str] = "palette"
    examples: ClassVar[tuple[str, ...]] = ("palette4-c8",)
    bits: int = 4
    group_channels: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4, 6, 8):
            raise EncodingError(f"a palette of {self.bits} bits is not an encoding", fix="use 1, 2, 3, 4, 6 or 8 bits")
        if self.group_channels is not None and self.group_channels < 1:
            raise EncodingError("a palette is shared by at least one channel", fix="give 1 or more, or none")

    @classmethod
    def named(cls, text: str) -> Palette | None:
        """``palette4``: one table for the tensor; ``-c8`` one for 8 output channels."""
        found = _NAME.fullmatch(text)
        if found is None:
            return None
        return cls(int(found["bits"]), int(found["channels"]) if found["channels"] else None)

    @property
    def short_name(self) -> str:
        """``palette4-c8``."""
        return f"palette{self.bits}" + (f"-c{self.group_channels}" if self.group_channels else "")

    def __str__(self) -> str:
        reach = "per tensor" if self.group_channels is None else f"per {self.group_channels} channels"
        return f"palette{self.bits} {reach}"

    @property
    def wider(self) -> tuple[Palette, ...]:
        """Tables of 8, 16 and 64 values."""
        return tuple(replace(self, bits=bits) for bits in (3, 4, 6) if bits > self.bits)

    def fitted(self, use: WeightUse) -> Palette:
        """Tables whose channels do not divide the outputs, and those of transposed convolutions, become one a
        tensor."""
        if use.channel_axis != 0 or use.shape[0] % (self.group_channels or 1):
            return replace(self, group_channels=None)
        return self

    def shared_bits(self, use: WeightUse, container_bits: int, scale_bits: int) -> int:
        """Tables of float16."""
        tables = use.shape[0] // self.group_channels if self.group_channels else 1
        return tables * (16 << self.bits)

    def rebuild(self, arrays: dict[str, Array]) -> PaletteTensor:
        """A tensor from ``indices`` and ``table``."""
        return PaletteTensor(arrays["indices"], arrays["table"], self)


@dataclass(frozen=True, eq=False)
class PaletteTensor:
    """A weight in indices into look-up tables.

    Args:
        indices: uint8, the weight's own shape, one index an element, not packed.
        table: float32 values on the float16 grid, ``(groups, 2**bits)``; group ``g`` serves output channels
            ``g * n .. (g + 1) * n - 1`` with ``n = channels / groups``.
    """

    indices: Array
    table: Array
    encoding: Palette

    def __post_init__(self) -> None:
        groups, entries = self.table.shape
        if entries != 1 << self.encoding.bits or (groups > 1 and self.indices.shape[0] % groups):
            raise EncodingError(
                f"tables of shape {self.table.shape} do not serve a weight of shape {self.indices.shape}",
                fix="give 2**bits entries, and a number of groups that divides the output channels",
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own shape."""
        return tuple(self.indices.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes of packed indices and float16 tables."""
        return -(-int(self.indices.size) * self.encoding.bits // 8) + 2 * int(self.table.size)

    def dequantize(self) -> Array:
        """The weight in float32: each index looked up in its group's table."""
        import numpy as np

        groups = self.table.shape[0]
        rows = self.indices.reshape(groups, -1).astype(np.int64)
        values: Array = np.take_along_axis(self.table.astype(np.float32), rows, axis=1)
        return values.reshape(self.shape)

    def arrays(self) -> dict[str, Array]:
        """What goes into a safetensors file, by role."""
        return {"indices": self.indices, "table": self.table}
