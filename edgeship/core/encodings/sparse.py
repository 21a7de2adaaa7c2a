"""Zeros left out of a weight of another family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from edgeship.core.encodings.affine import Affine, AffineTensor
from edgeship.core.encodings.family import Encoding
from edgeship.core.encodings.floats import Float, FloatTensor
from edgeship.core.encodings.palette import Palette, PaletteTensor
from edgeship.errors import EncodingError

if TYPE_CHECKING:
    from edgeship.core.encodings.family import Array
    from edgeship.core.inventory import WeightUse


_HALF = Float(16)
# What may stand inside a mask.
Dense: TypeAlias = Float | Affine | Palette
DenseTensor: TypeAlias = FloatTensor | AffineTensor | PaletteTensor


@dataclass(frozen=True)
class Sparse(Encoding):
    """Zeros left out: a bit a weight says where the others are, and ``inner`` says how those are stored."""

    kind: ClassVar[str] = "sparse"
    examples: ClassVar[tuple[str, ...]] = ("sparse-int8",)
    inner: Dense = _HALF

    @property
    def bits(self) -> int:
        """Bits of one weight that is not zero."""
        return self.inner.bits

    @classmethod
    def named(cls, text: str) -> Sparse | None:
        """``sparse-`` before a name of a float, of integers or of a palette."""
        rest = text.removeprefix("sparse-")
        inner = Float.named(rest) or Affine.named(rest) or Palette.named(rest)
        return cls(inner) if inner is not None and rest != text else None

    @property
    def short_name(self) -> str:
        """``sparse-int8``."""
        return f"sparse-{self.inner.short_name}"

    def __str__(self) -> str:
        return f"sparse {self.inner}"

    @property
    def dense(self) -> Dense:
        """How the values inside the mask are stored."""
        return self.inner

    def fitted(self, use: WeightUse) -> Sparse:
        """As the values inside fit."""
        return Sparse(self.inner.fitted(use))

    def shared_bits(self, use: WeightUse, container_bits: int, scale_bits: int) -> int:
        """The mask, and what the values inside share."""
        return use.elements + self.inner.shared_bits(use, container_bits, scale_bits)

    def stored_bits(self, use: WeightUse, container_bits: int, sparsity: float, scale_bits: int) -> int:
        """The mask, the values inside it, and what they share."""
        kept = round(use.elements * (1 - sparsity))
        return kept * container_bits + self.shared_bits(use, container_bits, scale_bits)

    def rebuild(self, arrays: dict[str, Array]) -> SparseTensor:
        """A tensor from ``mask`` and the arrays of the values inside."""
        inner = self.inner.rebuild({role: array for role, array in arrays.items() if role != "mask"})
        return SparseTensor(arrays["mask"].astype(bool), inner, self)


def without_zeros(encoding: Encoding, use: WeightUse, sparsity: float) -> Encoding:
    """Sparse where leaving a pruned weight's zeros out takes fewer bytes than storing them; else as it is."""
    if not isinstance(encoding, Dense) or (isinstance(encoding, Affine) and not encoding.symmetric):
        return encoding
    sparse, bits = Sparse(encoding), encoding.bits
    smaller = sparse.stored_bits(use, bits, sparsity, 16) < encoding.stored_bits(use, bits, 0.0, 16)
    return sparse if smaller else encoding


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """A weight with zeros left out.

    Args:
        mask: bool, the weight's own shape; True where a value is stored.
        inner: the values in the weight's own shape; what lies outside the mask is not stored, and is canonical here
            (integer or index 0, float 0.0), so that two tensors with the same stored bits are equal.
    """

    mask: Array
    inner: DenseTensor
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
