"""Floating point: the numbers themselves, in 16 or 32 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeship.core.encodings.family import Encoding
from edgeship.errors import EncodingError

if TYPE_CHECKING:
    from edgeship.core.encodings.family import Array
    from edgeship.core.inventory import WeightUse


@dataclass(frozen=True)
class Float(Encoding):
    """Floating point: 16 or 32 bits."""

    kind: ClassVar[str] = "float"
    examples: ClassVar[tuple[str, ...]] = ("float16",)
    bits: int = 16

    def __post_init__(self) -> None:
        if self.bits not in (16, 32):
            raise EncodingError(f"float{self.bits} is not an encoding", fix="use 16 or 32 bits")

    @classmethod
    def named(cls, text: str) -> Float | None:
        """``float16`` and ``float32``."""
        return cls(int(text[5:])) if text in ("float16", "float32") else None

    @property
    def short_name(self) -> str:
        """``float16``."""
        return f"float{self.bits}"

    def __str__(self) -> str:
        return f"float{self.bits}"

    def fitted(self, use: WeightUse) -> Float:
        """Every weight can be a float."""
        return self

    @property
    def rows_alone(self) -> bool:
        """Every number is."""
        return True

    def rebuild(self, arrays: dict[str, Array]) -> FloatTensor:
        """A tensor from ``values``."""
        return FloatTensor(arrays["values"])


@dataclass(frozen=True, eq=False)
class FloatTensor:
    """A weight in float16 or float32. ``values`` has the weight's own shape."""

    values: Array

    @property
    def encoding(self) -> Float:
        """Float of its width."""
        return Float(self.values.dtype.itemsize * 8)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own shape."""
        return tuple(self.values.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes in a file."""
        return int(self.values.nbytes)

    def dequantize(self) -> Array:
        """The weight in float32, in its own shape."""
        import numpy as np

        return self.values.astype(np.float32)

    def arrays(self) -> dict[str, Array]:
        """What goes into a safetensors file, by role."""
        return {"values": self.values}
