"""Encoded weights: the integers, scales and palettes that compression decides and every runtime stores.

An *encoding* (`Float`, `Affine`, ...) says how a weight is stored; an *encoded tensor* (`Float16Tensor`,
`AffineTensor`, ...) is a weight stored so. Arrays are NumPy; NumPy is imported where it is needed.

Rules for the numbers (each runtime stores them exactly only if they hold):
  - scales per tensor and per channel lie on the float16 grid, scales per group on the bfloat16 grid inside float16's
    normal range, so that float16, bfloat16 and float32 files hold the same number;
  - symmetric integers use the narrow range (-127..127, -7..7), zero point 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

from edgeship.errors import EncodingError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]

Granularity = Literal["tensor", "channel", "group"]


@dataclass(frozen=True)
class Float:
    """Floating point: 16 or 32 bits."""

    kind: ClassVar[str] = "float"
    bits: int = 16

    def __post_init__(self) -> None:
        if self.bits not in (16, 32):
            raise EncodingError(f"float{self.bits} is not an encoding", fix="use 16 or 32 bits")

    def __str__(self) -> str:
        return f"float{self.bits}"


@dataclass(frozen=True)
class Affine:
    """Integers with a scale: ``weight = scale * (value - zero_point)``.

    ``granularity`` says how far one scale reaches: the whole tensor, one output channel, or ``group_size``
    consecutive input channels of one output channel.
    """

    kind: ClassVar[str] = "affine"
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

    def __str__(self) -> str:
        reach = {"tensor": "per tensor", "channel": "per channel", "group": f"group {self.group_size}"}
        sign = "" if self.symmetric else " asymmetric"
        return f"int{self.bits} {reach[self.granularity]}{sign}"


Encoding: TypeAlias = Float | Affine


class EncodedTensor(Protocol):
    """A weight as it will be stored."""

    @property
    def encoding(self) -> Encoding:
        """How it is stored."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own shape."""

    @property
    def stored_bytes(self) -> int:
        """Bytes in a file, packed."""

    def dequantize(self) -> Array:
        """The weight in float32."""

    def arrays(self) -> dict[str, Array]:
        """What goes into a safetensors file, by role."""


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


def expand_blocks(blocks: Array, shape: tuple[int, ...]) -> Array:
    """Repeat one number a block until it has ``shape``. Axes of ``blocks`` divide those of ``shape``."""
    import numpy as np

    for axis, (have, want) in enumerate(zip(blocks.shape, shape, strict=True)):
        if have not in (1, want):
            blocks = np.repeat(blocks, want // have, axis=axis)
    return np.broadcast_to(blocks, shape)


def rebuild(encoding: Encoding, arrays: dict[str, Array]) -> EncodedTensor:
    """The inverse of ``arrays()``: an encoded tensor from its encoding and its arrays by role."""
    if isinstance(encoding, Float):
        return FloatTensor(arrays["values"])
    return AffineTensor(arrays["values"], arrays["scale"], arrays.get("zero_point"), encoding)


@dataclass(frozen=True)
class ActivationEncoding:
    """Static integers for one activation: ``value = scale * (integer - zero_point)``, per tensor.

    int8 is stored as it is; int16 is symmetric (zero point 0), because that is what LiteRT takes, and becomes
    uint16 with zero point 32768 where a runtime wants it unsigned: the same grid.
    """

    bits: int
    scale: float
    zero_point: int

    @property
    def low(self) -> int:
        """Smallest integer of the grid."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest integer of the grid."""
        return (1 << (self.bits - 1)) - 1


def same_numbers(ours: EncodedTensor, stored: EncodedTensor) -> str:
    """Empty when two encoded tensors hold the same bits, else a sentence that names the first difference."""
    import numpy as np

    if type(ours) is not type(stored) or ours.encoding.bits != stored.encoding.bits:
        return f"decided {ours.encoding}, stored {stored.encoding}"
    mine, theirs = ours.arrays(), stored.arrays()
    if mine.keys() != theirs.keys():
        return f"decided {sorted(mine)}, stored {sorted(theirs)}"
    for role, wanted in mine.items():
        found = theirs[role]
        if wanted.shape != found.shape:
            return f"{role}: shape {wanted.shape} decided, {found.shape} stored"
        different = int(np.count_nonzero(~_same(wanted, found)))
        if different:
            return f"{role}: {different} of {wanted.size} numbers differ"
    return ""


def _same(a: Array, b: Array) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.asarray((a == b) | ((a != a) & (b != b)))
