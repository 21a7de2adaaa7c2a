"""How one decided weight is written into a Core AI program: named constants, and what decompresses them.

The constant with the integers, indices or floats has the weight's own name; beside it stand ``weight.scale``,
``weight.zero_point``, ``weight.table`` and ``weight.mask``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias, assert_never

import numpy as np

from edgeship.compat.coreai import (
    DenseElementsAttr,
    DenseResourceElementsAttr,
    F16Type,
    F32Type,
    Float4E2M1FNType,
    Float8E8M0FNUType,
    FloatAttr,
    IntegerType,
    RankedTensorType,
)
from edgeship.compat.coreai import dialect as coreai
from edgeship.core.weights import AffineTensor, FloatTensor, MXFP4Tensor, PaletteTensor, SparseTensor
from edgeship.errors import EncodingError

if TYPE_CHECKING:
    from edgeship.compat.coreai import Type, Value
    from edgeship.core.weights import Affine, Array, EncodedTensor

Stored: TypeAlias = FloatTensor | AffineTensor | PaletteTensor | SparseTensor | MXFP4Tensor


def build(name: str, tensor: EncodedTensor, *, half: bool) -> tuple[Value, str]:
    """The value of a weight in a program, and the name that its integers, indices or floats got.

    Args:
        half: the program computes in float16.

    Raises:
        EncodingError: there is no form for the encoding, or a number does not fit float16.
    """
    if not isinstance(tensor, Stored):
        raise EncodingError(f"Core AI cannot store {tensor.encoding} for {name}", fix="use another encoding")
    match tensor:
        case FloatTensor():
            return constant(name, tensor.values, F16Type.get() if half else F32Type.get())
        case PaletteTensor():
            indices, stored = _indices(name, tensor, None)
            return coreai.lut_to_dense(indices, _table(name, tensor, half), first_axis()), stored
        case SparseTensor():
            return _sparse(name, tensor, half)
        case AffineTensor():
            integers, stored = _integers(name, tensor, None)
            return _scaled(name, integers, tensor, half, _integer(tensor)), stored
        case MXFP4Tensor():
            return _microscaled(name, tensor, half)
        case _:
            assert_never(tensor)


def pack(values: Array, bits: int) -> Array:
    """Integers of 1 to 8 bits as one stream of bits, the lowest first, in bytes; a flat array.

    Integers of 3 and 6 bits are filled up to eight and four, which take three bytes.
    """
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    if bits == 8:
        return flat
    stream = flat[:, None] >> np.arange(bits, dtype=np.uint8) & 1
    whole = math.lcm(bits, 8) // bits
    padded = np.zeros((-(-flat.size // whole) * whole, bits), np.uint8)
    padded[: flat.size] = stream
    return np.packbits(padded.reshape(-1), bitorder="little")


def constant(name: str, data: Array, element: Type, shape: tuple[int, ...] | None = None) -> tuple[Value, str]:
    """A constant kept under ``name``; the name it really got is the second result."""
    kind = RankedTensorType.get(list(data.shape if shape is None else shape), element)
    attribute = DenseResourceElementsAttr.get_from_buffer(np.ascontiguousarray(data), name, kind)
    value = coreai.ConstantOp(value=attribute).result
    return value, str(attribute).split("<", 1)[1].split(">", 1)[0].strip('"')


def _sparse(name: str, tensor: SparseTensor, half: bool) -> tuple[Value, str]:
    """Zeros are filled in among the integers, and scaled; a palette is looked up first, as index 0 is not a zero."""
    inside, inner = tensor.mask, tensor.inner
    if not inside.any():
        raise EncodingError(
            f"{name} is all zeros, and Core AI stores no sparse weight without values",
            fix="prune less, or store it dense",
        )
    mask, _ = constant(f"{name}.mask", pack(inside.astype(np.uint8), 1), IntegerType.get_unsigned(1), tensor.shape)
    match inner:
        case FloatTensor():
            values, stored = constant(name, inner.values[inside], F16Type.get() if half else F32Type.get())
            return _filled(values, mask), stored
        case PaletteTensor():
            indices, stored = _indices(name, inner, inside)
            sparse = coreai.build_sparse_with_bitmask(indices, mask)
            looked_up = coreai.lut_to_sparse_with_bitmask(sparse, _table(name, inner, half), first_axis())
            return coreai.sparse_with_bitmask_to_dense(looked_up), stored
        case AffineTensor():
            if inner.encoding.bits < 8:
                integers, stored = _listed(name, inner, inside, mask)
                return _scaled(name, integers, inner, half, _int8()), stored
            values, stored = _integers(name, inner, inside)
            return _scaled(name, _filled(values, mask), inner, half, _integer(inner)), stored
        case _:
            assert_never(inner)


def _filled(values: Value, mask: Value) -> Value:
    """Values where a mask says, among zeros."""
    return coreai.sparse_with_bitmask_to_dense(coreai.build_sparse_with_bitmask(values, mask))


def _listed(name: str, tensor: AffineTensor, inside: Array, mask: Value) -> tuple[Value, str]:
    """Signed integers of fewer than 8 bits cannot be sparse; indices into the list of those integers can."""
    bits = container(tensor.encoding)
    low = -(1 << (bits - 1))
    listed = (tensor.values[inside].astype(np.int16) - low).astype(np.uint8)
    indices, stored = constant(name, pack(listed, bits), IntegerType.get_unsigned(bits), listed.shape)
    shape = (*[1] * len(tensor.shape), 1 << bits, 1)
    table, _ = constant(f"{name}.integers", np.arange(low, -low, dtype=np.int8).reshape(shape), _int8())
    sparse = coreai.lut_to_sparse_with_bitmask(coreai.build_sparse_with_bitmask(indices, mask), table, first_axis())
    return coreai.sparse_with_bitmask_to_dense(sparse), stored


def _integers(name: str, tensor: AffineTensor, inside: Array | None) -> tuple[Value, str]:
    bits = container(tensor.encoding)
    values = tensor.values if inside is None else tensor.values[inside]
    return constant(name, pack(values, bits), _integer(tensor), values.shape)


def _indices(name: str, tensor: PaletteTensor, inside: Array | None) -> tuple[Value, str]:
    """The indices of a palette in their own shape, or [kept] where zeros are left out."""
    bits = tensor.encoding.bits
    indices = tensor.indices if inside is None else tensor.indices[inside]
    return constant(name, pack(indices, bits), IntegerType.get_unsigned(bits), indices.shape)


def _scaled(name: str, integers: Value, tensor: AffineTensor, half: bool, integer: Type) -> Value:
    blocks = tensor.scale.shape
    scale, _ = _floats(f"{name}.scale", tensor.scale, half)
    if tensor.zero_point is None:
        zero = coreai.constant(np.zeros(blocks, np.int8), dtype=integer)
    else:
        bits = container(tensor.encoding)
        zero, _ = constant(f"{name}.zero_point", pack(tensor.zero_point, bits), integer, blocks)
    offset = coreai.constant(np.zeros(blocks, np.float16 if half else np.float32))
    return coreai.blockwise_shift_scale(integers, scale, zero, offset)


def _microscaled(name: str, tensor: MXFP4Tensor, half: bool) -> tuple[Value, str]:
    """Elements and exponents as they are: Core AI has both types."""
    if half:
        refuse_beyond_float16(name, tensor)
    elements, stored = constant(name, pack(tensor.elements, 4), Float4E2M1FNType.get(), tensor.shape)
    scale, _ = constant(f"{name}.scale", tensor.exponents, Float8E8M0FNUType.get())
    return shifted(elements, scale, tensor.exponents.shape, half), stored


def shifted(elements: Value, scale: Value, blocks: tuple[int, ...], half: bool) -> Value:
    """Elements of MXFP4 times their scales, with no offset before or after."""
    splat = DenseElementsAttr.get_splat(
        RankedTensorType.get(list(blocks), Float4E2M1FNType.get()), FloatAttr.get(Float4E2M1FNType.get(), 0.0)
    )
    zero = coreai.ConstantOp(value=splat).result
    offset = coreai.constant(np.zeros(blocks, np.float16 if half else np.float32))
    return coreai.blockwise_shift_scale(elements, scale, zero, offset)


def refuse_beyond_float16(name: str, tensor: MXFP4Tensor) -> None:
    """Raise `EncodingError` where a float16 program cannot hold every number of a weight."""
    if not tensor.fits_float16:
        raise EncodingError(f"{name} has scales beyond those of float16", fix="lower in float32")


def _table(name: str, tensor: PaletteTensor, half: bool) -> Value:
    """Tables in the axes that Core AI wants: groups of channels, one for each other axis, entries, one."""
    groups, entries = tensor.table.shape
    shape = (groups, *[1] * (len(tensor.shape) - 1), entries, 1)
    return _floats(f"{name}.table", tensor.table.reshape(shape), half)[0]


def _floats(name: str, numbers: Array, half: bool) -> tuple[Value, str]:
    stored = numbers.astype(np.float16 if half else np.float32)
    if not np.array_equal(stored.astype(np.float32), numbers):
        raise EncodingError(f"a number of {name} is not a float16 number", fix="lower in float32")
    return constant(name, stored, F16Type.get() if half else F32Type.get())


def _integer(tensor: AffineTensor) -> Type:
    bits = container(tensor.encoding)
    return IntegerType.get_signed(bits) if tensor.encoding.symmetric else IntegerType.get_unsigned(bits)


def container(encoding: Affine) -> int:
    """Bits of one integer in the file."""
    # There are no 3-bit integers; 4 bits hold them exactly.
    return 4 if encoding.bits == 3 else encoding.bits


def _int8() -> Type:
    return IntegerType.get_signed(8)


def first_axis() -> Value:
    """The axis along which a palette's vectors lie."""
    # Where vectors lie, which ours have none of; a 16-bit scalar all the same.
    return coreai.constant(np.array(0, np.int16))
