"""What a package stores, in the words of compression: `StoredConstant` to `EncodedTensor`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgeship.core.encodings.mxfp4 import BIAS, DOUBLED
from edgeship.core.weights import (
    Affine,
    AffineTensor,
    Float,
    FloatTensor,
    MXFP4Tensor,
    Palette,
    PaletteTensor,
    Sparse,
    SparseTensor,
)
from edgeship.errors import ArtifactError
from edgeship.runtimes.coreml.weights import read_stored_weights

if TYPE_CHECKING:
    from pathlib import Path

    from edgeship.core.model import Placement
    from edgeship.core.weights import Array, EncodedTensor, Granularity
    from edgeship.runtimes.coreml.weights import StoredConstant

FLOATS = ("float16", "float32")


def encoded_weights(package: Path) -> dict[str, EncodedTensor]:
    """Every float constant and every compressed weight, by its name in the package, in its stored shape."""
    found: dict[str, EncodedTensor] = {}
    for name, constant in read_stored_weights(package).items():
        tensor = as_encoded(constant)
        if tensor is not None:
            found[name] = tensor
    return found


def as_encoded(constant: StoredConstant) -> EncodedTensor | None:
    """A constant in the words of compression; None for what that never makes, such as constants of integers.

    The shape is the constant's.
    """
    kind = constant.kind
    if kind in FLOATS and constant.values is not None:
        return FloatTensor(constant.values.reshape(constant.shape))
    if kind in ("affine", "affine+palette", "palette+affine") and constant.scale is not None:
        if _is_on_a_grid(constant):
            return None
        if constant.bits == 4 and constant.indices is not None and constant.values is None:
            return _microscaled(constant, constant.indices, constant.scale)
        return _affine(constant, constant.scale)
    if kind == "palette" and constant.indices is not None and constant.lut is not None:
        return _palette(constant, constant.indices, constant.lut)
    if kind.startswith("sparse") and constant.mask is not None and constant.nonzero is not None:
        return _sparse(constant, constant.mask.astype(bool), constant.nonzero)
    return None


def _is_on_a_grid(constant: StoredConstant) -> bool:
    """Whether it is a constant among static activations, on their grid: int8 with a zero point, as no weight is."""
    signed = constant.values is not None and constant.values.dtype == np.int8
    return signed and constant.zero_point is not None and bool(np.any(constant.zero_point))


def in_torch_layout(tensor: EncodedTensor, placement: Placement) -> EncodedTensor:
    """The weight as torch lays it out: a placement's reshape and permutation undone."""
    order = placement.permutation
    if order is None or not isinstance(tensor, FloatTensor):
        return tensor
    # Axes longer than one keep the order of the permutation, wherever axes of size one stand; those are at its end.
    long = [size for size in tensor.shape if size != 1]
    own = tensor.values.reshape(long + [1] * (len(order) - len(long)))
    return FloatTensor(np.ascontiguousarray(own.transpose(np.argsort(order))))


def _microscaled(constant: StoredConstant, codes: Array, scale: Array) -> MXFP4Tensor:
    """Elements of MXFP4, from indices into the list of twice their numbers and halved scales."""
    if tuple(_list(constant).tolist()) != DOUBLED:
        raise ArtifactError(f"{constant.name} looks up a list that is not MXFP4's", fix="build the package again")
    halves, exponents = np.frexp(scale.astype(np.float32))
    if np.any(halves != 0.5):
        raise ArtifactError(f"{constant.name} has scales that are no powers of two", fix="build the package again")
    # frexp says 0.5 * 2**exponents: half of the scale that the family means.
    return MXFP4Tensor(codes.astype(np.uint8), (exponents + BIAS).astype(np.uint8))


def _palette(constant: StoredConstant, indices: Array, lut: Array) -> PaletteTensor:
    """Tables lie along axis 0 only, and an entry is one number; iOS 16 has one table without axes."""
    entries = 2**constant.bits
    rank = len(constant.shape)
    groups = lut.size // entries
    if lut.ndim > 1 and lut.shape != (groups, *[1] * (rank - 1), entries, 1):
        raise ArtifactError(f"{constant.name} has tables of shape {lut.shape}", fix="build the package again")
    shared = constant.shape[0] // groups if groups > 1 else None
    table = lut.reshape(groups, entries).astype(np.float32)
    return PaletteTensor(indices.reshape(constant.shape), table, Palette(constant.bits, shared))


def _sparse(constant: StoredConstant, mask: Array, stored: Array) -> SparseTensor:
    """The values put where the mask says, zeros elsewhere, and read as a dense weight would be.

    ``mask`` has the weight's shape; ``stored`` [kept].
    """

    def dense(values: Array) -> Array:
        full = np.zeros(mask.shape, values.dtype)
        full[mask] = values
        return full

    inner: FloatTensor | AffineTensor | PaletteTensor
    encoding: Float | Affine | Palette
    if constant.kind == "sparse+palette" and constant.lut is not None:
        inner = _palette(constant, dense(stored), constant.lut)
        encoding = inner.encoding
    elif constant.kind == "sparse+affine" and constant.scale is not None:
        inner = _affine(replace(constant, kind="affine", values=dense(stored)), constant.scale)
        encoding = inner.encoding
    elif constant.kind == "sparse":
        inner = FloatTensor(dense(stored))
        encoding = inner.encoding
    else:
        raise ArtifactError(f"{constant.name} is stored as {constant.kind}", fix="build the package again")
    return SparseTensor(mask, inner, Sparse(encoding))


def _affine(constant: StoredConstant, scale: Array) -> AffineTensor:
    values = _integers(constant)
    blocks = _blocks(constant, scale)
    zero = None if constant.zero_point is None else _blocks(constant, constant.zero_point)
    symmetric = values.dtype == np.int8
    if not symmetric and zero is None:
        zero = np.zeros(blocks.shape, values.dtype)
    encoding = Affine(
        constant.bits if constant.bits in (2, 3, 4, 8) else 8, symmetric, *_reach(values.shape, blocks.shape)
    )
    return AffineTensor(values, blocks.astype(np.float32), None if symmetric else zero, encoding)


def _integers(constant: StoredConstant) -> Array:
    """The integers; two and three bits are kept as indices into the list of all integers of that width.

    From iOS 26 Core ML scales what it looked up (``affine+palette``); before, it scales the list: the same numbers.
    """
    if constant.kind == "affine" and constant.values is not None:
        return constant.values
    if constant.indices is None:
        raise ArtifactError(f"{constant.name} lacks its integers", fix="build the package again")
    integers: Array = _list(constant)[constant.indices]
    return integers


def _list(constant: StoredConstant) -> Array:
    """The list of integers that indices of two or three bits stand for."""
    lists = constant.values if constant.kind == "palette+affine" else constant.lut
    if lists is None:
        raise ArtifactError(f"{constant.name} lacks its integers", fix="build the package again")
    rows = lists.reshape(-1, 2**constant.bits)
    if np.any(rows != rows[0]):
        raise ArtifactError(f"{constant.name} has a palette in groups, not one list of integers", fix="build it again")
    row: Array = rows[0]
    return row


def _blocks(constant: StoredConstant, numbers: Array) -> Array:
    """Scales or zero points with the rank of the weight; iOS 16 keeps a scalar, or a vector along an axis."""
    rank = len(constant.shape)
    if constant.kind == "palette+affine":
        # A list has two axes more than the weight: its entries, and the length of each.
        numbers = numbers.reshape(numbers.shape[:rank])
    if numbers.ndim == rank and constant.axis is None:
        return numbers
    shape = [1] * rank
    if numbers.size > 1:
        shape[constant.axis or 0] = numbers.size
    return numbers.reshape(shape)


def _reach(shape: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[Granularity, int | None]:
    wide = [axis for axis, size in enumerate(blocks) if size > 1]
    if not wide and shape[0] != 1:
        return "tensor", None
    if len(wide) <= 1 and all(blocks[axis] == shape[axis] for axis in wide):
        return "channel", None
    return "group", shape[1] // blocks[1]
