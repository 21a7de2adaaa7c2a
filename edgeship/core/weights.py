"""Encoded weights: the integers, scales and palettes that compression decides and every runtime stores.

An *encoding* (`Float`, `Affine`, `Palette`, `Sparse`) says how a weight is stored; an *encoded tensor* (`FloatTensor`,
`AffineTensor`, `PaletteTensor`, `SparseTensor`) is a weight stored so. Arrays are NumPy, which is imported where it is
needed.

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


@dataclass(frozen=True)
class Palette:
    """A look-up table of ``2**bits`` float16 values, and an index a weight.

    ``group_channels`` output channels (axis 0) share one table; None means one table for the whole tensor.
    """

    kind: ClassVar[str] = "palette"
    bits: int = 4
    group_channels: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4, 6, 8):
            raise EncodingError(f"a palette of {self.bits} bits is not an encoding", fix="use 1, 2, 3, 4, 6 or 8 bits")
        if self.group_channels is not None and self.group_channels < 1:
            raise EncodingError("a palette is shared by at least one channel", fix="give 1 or more, or none")

    def __str__(self) -> str:
        reach = "per tensor" if self.group_channels is None else f"per {self.group_channels} channels"
        return f"palette{self.bits} {reach}"


@dataclass(frozen=True)
class Sparse:
    """Zeros left out: a bit a weight says where the others are, and ``inner`` says how those are stored."""

    kind: ClassVar[str] = "sparse"
    inner: Float | Affine | Palette = Float(16)

    @property
    def bits(self) -> int:
        """Bits of one weight that is not zero."""
        return self.inner.bits

    def __str__(self) -> str:
        return f"sparse {self.inner}"


Encoding: TypeAlias = Float | Affine | Palette | Sparse


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


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """A weight with zeros left out.

    Args:
        mask: bool, the weight's own shape; True where a value is stored.
        inner: the values in the weight's own shape; what lies outside the mask is not stored, and is canonical here
            (integer or index 0, float 0.0), so that two tensors with the same stored bits are equal.
    """

    mask: Array
    inner: FloatTensor | AffineTensor | PaletteTensor
    encoding: Sparse

    def __post_init__(self) -> None:
        if self.mask.shape != self.inner.shape:
            raise EncodingError(f"a mask of shape {self.mask.shape} does not fit a weight of shape {self.inner.shape}")
        if isinstance(self.inner, AffineTensor) and not self.inner.encoding.symmetric:
            raise EncodingError("zeros of a sparse weight need a symmetric grid", fix="use symmetric integers")

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own shape."""
        return tuple(self.mask.shape)

    @property
    def sparsity(self) -> float:
        """Share of weights left out."""
        import numpy as np

        return 1 - float(np.count_nonzero(self.mask)) / max(int(self.mask.size), 1)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the mask, the packed values inside it, and their scales or tables."""
        import numpy as np

        kept = int(np.count_nonzero(self.mask))
        extra = sum(2 * int(array.size) for role, array in self.inner.arrays().items() if role in ("scale", "table"))
        return -(-int(self.mask.size) // 8) + -(-kept * self.inner.encoding.bits // 8) + extra

    def dequantize(self) -> Array:
        """The weight in float32, zero outside the mask."""
        import numpy as np

        return np.where(self.mask, self.inner.dequantize(), np.float32(0))

    def arrays(self) -> dict[str, Array]:
        """What goes into a safetensors file, by role."""
        return {"mask": self.mask, **self.inner.arrays()}


def expand_blocks(blocks: Array, shape: tuple[int, ...]) -> Array:
    """Repeat one number a block until it has ``shape``. Axes of ``blocks`` divide those of ``shape``."""
    import numpy as np

    for axis, (have, want) in enumerate(zip(blocks.shape, shape, strict=True)):
        if have not in (1, want):
            blocks = np.repeat(blocks, want // have, axis=axis)
    return np.broadcast_to(blocks, shape)


def rebuild(encoding: Encoding, arrays: dict[str, Array]) -> EncodedTensor:
    """The inverse of ``arrays()``: an encoded tensor from its encoding and its arrays by role."""
    if isinstance(encoding, Sparse):
        inner = rebuild(encoding.inner, {role: array for role, array in arrays.items() if role != "mask"})
        assert isinstance(inner, (FloatTensor, AffineTensor, PaletteTensor))
        return SparseTensor(arrays["mask"].astype(bool), inner, encoding)
    if isinstance(encoding, Palette):
        return PaletteTensor(arrays["indices"], arrays["table"], encoding)
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


def same_numbers(ours: EncodedTensor, stored: EncodedTensor, *, container_bits: int | None = None) -> str:
    """Empty when two encoded tensors hold the same numbers, else a sentence that names the first difference.

    ``container_bits`` is the width that the file must have, where that is not the decided one (3-bit integers stored
    in 4 bits).
    """
    import numpy as np

    if type(ours) is not type(stored) or stored.encoding.bits != (container_bits or ours.encoding.bits):
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

    equal = np.asarray(a == b)
    return equal if a.dtype.kind != "f" else equal | ((a != a) & (b != b))
