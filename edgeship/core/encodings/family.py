"""What a family of encodings is: how it is named, what it takes in a file, and how its weights are rebuilt.

A *family* is a class of encodings (`edgeship.core.encodings.affine.Affine` and its siblings), an *encoding* one of its
instances, and an *encoded tensor* a weight stored so. A family has a file of its own, here or in a package that adds
it (docs/adding-an-encoding.md). Arrays are NumPy, which is imported where it is needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeAlias

from edgeship.errors import EncodingError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeship.core.inventory import WeightUse

    Array: TypeAlias = npt.NDArray[Any]


class Encoding(ABC):
    """How a weight is stored. A family is a frozen dataclass of this class; its fields tell its members apart.

    Class attributes:
        kind: the family's name in records (``program.json``); no other family has it.
        examples: short names of some members, for help and errors.
    """

    kind: ClassVar[str]
    examples: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:
        # Members have it as a field or as a property. At run time a property here would become the field's default.
        @property
        def bits(self) -> int:
            """Bits of one number, without what is shared by many (scales, tables)."""

    @classmethod
    @abstractmethod
    def named(cls, text: str) -> Self | None:
        """The member of a short name; None when the name belongs to no member."""

    @property
    @abstractmethod
    def short_name(self) -> str:
        """As profiles and ``--set`` write it; the inverse of `named`."""

    @abstractmethod
    def __str__(self) -> str:
        """In words, for reports: ``int4 group 32``."""

    @abstractmethod
    def rebuild(self, arrays: dict[str, Array]) -> EncodedTensor:
        """The inverse of `EncodedTensor.arrays`: a tensor of this encoding from its arrays by role."""

    def fitted(self, use: WeightUse) -> Encoding:
        """The encoding as one weight can take it; another where the weight's shape or operator does not allow this."""
        return self

    @property
    def dense(self) -> Encoding:
        """How the numbers themselves are stored, where this one leaves zeros out; else itself."""
        return self

    @property
    def wider(self) -> tuple[Encoding, ...]:
        """Encodings of the family with more bits, fewest first, that are worth a try where these are too few."""
        return ()

    @property
    def rows_alone(self) -> bool:
        """Whether each output channel is rounded without a look at the others, so that they can come in parts."""
        return False

    def shared_bits(self, use: WeightUse, container_bits: int, scale_bits: int) -> int:
        """Bits that a weight takes beside its numbers: scales, zero points, tables.

        Args:
            container_bits: of one number in the file. scale_bits: of one scale there.
        """
        return 0

    def stored_bits(self, use: WeightUse, container_bits: int, sparsity: float, scale_bits: int) -> int:
        """Bits that a weight takes in a file, with all that belongs to it; ``sparsity`` is its share of zeros."""
        return use.elements * container_bits + self.shared_bits(use, container_bits, scale_bits)

    def encode(self, weight: Array, *, axis: int = 0, clip: bool = False, name: str = "weight") -> EncodedTensor:
        """Round a float32 weight by its own numbers alone.

        Families whose rounding looks at data too have theirs in `edgeship.compression` instead.

        Args:
            weight: the weight's own shape. axis: of output channels.
            clip: choose ranges by squared error, instead of covering the largest number.
            name: of the weight, for errors.

        Raises:
            EncodingError: the family has no such way.
        """
        raise EncodingError(f"nothing rounds {name} to {self}", fix="choose another encoding")

    def alike(self, other: Encoding, container_bits: int) -> bool:
        """Whether a file that says ``other`` can hold this one, in a container of so many bits."""
        return type(self) is type(other) and other.bits == container_bits

    @property
    def stored_as(self) -> Encoding | None:
        """The encoding of another family that holds the same numbers, bit for bit; None where there is none.

        A format that knows nothing of this family, and holds that one, then stores `EncodedTensor.stored_as`.
        """
        return None


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


class Translated(EncodedTensor, Protocol):
    """An encoded tensor whose family has `Encoding.stored_as`."""

    def stored_as(self) -> EncodedTensor:
        """The same numbers in the encoding `Encoding.stored_as`; it dequantizes to the same float32 numbers."""


def expand_blocks(blocks: Array, shape: tuple[int, ...]) -> Array:
    """Repeat one number a block until it has ``shape``. Axes of ``blocks`` divide those of ``shape``."""
    import numpy as np

    for axis, (have, want) in enumerate(zip(blocks.shape, shape, strict=True)):
        if have not in (1, want):
            blocks = np.repeat(blocks, want // have, axis=axis)
    return np.broadcast_to(blocks, shape)


def packed_bytes(count: int, bits: int) -> int:
    """Whole bytes of ``count`` numbers of ``bits`` bits, packed."""
    return -(-count * bits // 8)


def same_numbers(ours: EncodedTensor, stored: EncodedTensor, *, container_bits: int | None = None) -> str:
    """Empty when two encoded tensors hold the same numbers, else a sentence that names the first difference.

    ``container_bits`` is the width that the file must have, where that is not the decided one (3-bit integers stored
    in 4 bits).
    """
    import numpy as np

    if type(ours) is not type(stored) or not ours.encoding.alike(stored.encoding, container_bits or ours.encoding.bits):
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
