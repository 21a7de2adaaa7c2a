"""NF4: sixteen levels that are equally likely in a normal distribution, times the largest number of some channels.

Dettmers et al. 2023, QLoRA, arXiv:2305.14314, appendix E has the levels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from edgeship.core.encodings import Encoding
from edgeship.core.inventory import WeightUse
from edgeship.core.weights import Affine, Palette, PaletteTensor
from edgeship.errors import EncodingError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NAME = re.compile(r"nf4-c(\d+)")


@dataclass(frozen=True)
class NF4(Encoding):
    """NormalFloat of four bits; ``channels`` output channels share a largest number."""

    kind: ClassVar[str] = "nf4"
    examples: ClassVar[tuple[str, ...]] = ("nf4-c8",)
    channels: int = 8

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise EncodingError("NF4 is shared by at least one channel", fix="write nf4-c8")

    @property
    def bits(self) -> int:
        """Four."""
        return 4

    @classmethod
    def named(cls, text: str) -> NF4 | None:
        """``nf4-c8``."""
        found = NAME.fullmatch(text)
        return None if found is None else cls(int(found[1]))

    @property
    def short_name(self) -> str:
        """``nf4-c8``."""
        return f"nf4-c{self.channels}"

    def __str__(self) -> str:
        return f"nf4 per {self.channels} channels"

    def fitted(self, use: WeightUse) -> Encoding:
        """What the channels do not divide gets int8."""
        return self if use.channel_axis == 0 and use.shape[0] % self.channels == 0 else Affine(8)

    def encode(self, weight: npt.NDArray[Any], *, axis: int = 0, clip: bool = False, name: str = "weight") -> NF4Tensor:
        """Each number to the nearest level; there is nothing to clip."""
        import numpy as np

        # [out, in, ...] -> [groups, numbers]
        rows = weight.reshape(weight.shape[0] // self.channels, -1)
        largest = np.abs(rows).max(axis=1).astype(np.float16).astype(np.float32)
        if not np.isfinite(largest).all():
            raise EncodingError(f"{name} holds what is no float16", fix="keep it in float32")
        indices = np.abs(rows[:, :, None] - _tables(largest)[:, None, :]).argmin(axis=2)
        return NF4Tensor(indices.astype(np.uint8).reshape(weight.shape), largest, self)

    def rebuild(self, arrays: dict[str, npt.NDArray[Any]]) -> NF4Tensor:
        """A tensor from what `NF4Tensor.arrays` gave."""
        return NF4Tensor(arrays["indices"], arrays["largest"], self)

    @property
    def stored_as(self) -> Encoding:
        """A palette holds the same numbers: its tables are the levels times the largest number."""
        return Palette(4, self.channels)


@dataclass(frozen=True, eq=False)
class NF4Tensor:
    """A weight in NF4.

    Args:
        indices: uint8 levels, the weight's own shape. largest: float32 on the float16 grid, one a group of channels.
    """

    indices: npt.NDArray[Any]
    largest: npt.NDArray[Any]
    encoding: NF4

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own shape."""
        return tuple(self.indices.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes of packed indices, and of tables."""
        return self.stored_as().stored_bytes

    def dequantize(self) -> npt.NDArray[Any]:
        """The weight in float32."""
        return self.stored_as().dequantize()

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What goes into a safetensors file, by role."""
        return {"indices": self.indices, "largest": self.largest}

    def stored_as(self) -> PaletteTensor:
        """The palette that a file holds."""
        return PaletteTensor(self.indices, _tables(self.largest), Palette(4, self.encoding.channels))


def _tables(largest: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Tables ``[groups, 16]`` on the float16 grid, from one number a group."""
    import numpy as np

    levels = np.array(LEVELS, np.float32)
    return (largest[:, None] * levels).astype(np.float16).astype(np.float32)
