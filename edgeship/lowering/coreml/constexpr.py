"""How one decided weight is written into an mlprogram: the ``constexpr_*`` operations, by version of iOS.

All numbers go in as they were decided, floats in float32; coremltools makes float16 of them in a float16 program, and
they lie on its grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, assert_never

import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types

from edgeship.core.encodings.mxfp4 import DOUBLED
from edgeship.core.weights import AffineTensor, FloatTensor, MXFP4Tensor, PaletteTensor, SparseTensor

if TYPE_CHECKING:
    from edgeship.core.weights import Array

Stored: TypeAlias = AffineTensor | PaletteTensor | SparseTensor | MXFP4Tensor
IOS18 = 18


def build(tensor: Stored, ios: int, before: Any, *, listed: bool = True) -> Any:
    """The variable that holds ``tensor``, built before the operation ``before`` and named after it.

    Args:
        ios: the version to store for.
        listed: integers of 2 and 3 bits may be indices into a list of them; else they stand in 4 bits.
    """
    new = ios >= IOS18
    match tensor:
        case SparseTensor():
            return (_sparse if new else _packed_sparse)(tensor, before)
        case PaletteTensor():
            return (_palette if new else _packed_palette)(tensor, before)
        case AffineTensor():
            return _blockwise(tensor, before, listed) if new else _by_channel(tensor, before)
        case MXFP4Tensor():
            return _microscaled(tensor, before)
        case _:
            assert_never(tensor)


def _blockwise(tensor: AffineTensor, before: Any, listed: bool) -> Any:
    """IOS 18: any block, 8 and 4 bits as they are; 3 and 2 bits as indices into the list of all their integers.

    Before iOS 26 Core ML must scale that list before it looks up; coremltools changes the order then, and repeats the
    list for each scale.
    """
    bits, signed = tensor.encoding.bits, tensor.encoding.symmetric
    zero = tensor.zero_point
    offset: Any = None
    if bits < 4 and listed:
        indices, table = _listed(tensor)
        data: Any = mb.constexpr_lut_to_dense(
            indices=_typed(indices, f"uint{bits}"), lut=table, before_op=before, name=f"{before.name}_integers"
        )
        offset = zero
    else:
        kind = f"int{max(bits, 4)}" if signed else f"uint{max(bits, 4)}"
        data = _typed(tensor.values, kind)
        offset = None if zero is None else _typed(zero, kind)
    arguments = {} if offset is None else {"offset": offset}
    return mb.constexpr_blockwise_shift_scale(
        data=data, scale=tensor.scale.astype(np.float32), before_op=before, name=before.name, **arguments
    )


def _microscaled(tensor: MXFP4Tensor, before: Any) -> Any:
    """IOS 26: elements as indices into the list of twice their numbers, which are integers; scales are halved."""
    table = np.array(DOUBLED, np.int8).reshape([1] * len(tensor.shape) + [len(DOUBLED), 1])
    data = mb.constexpr_lut_to_dense(
        indices=_typed(tensor.elements, "uint4"), lut=table, before_op=before, name=f"{before.name}_elements"
    )
    return mb.constexpr_blockwise_shift_scale(data=data, scale=tensor.scale / 2, before_op=before, name=before.name)


def _palette(tensor: PaletteTensor, before: Any) -> Any:
    """IOS 18: a table for each group of channels."""
    return mb.constexpr_lut_to_dense(
        indices=_typed(tensor.indices, f"uint{tensor.encoding.bits}"),
        lut=_table(tensor),
        before_op=before,
        name=before.name,
    )


def _sparse(tensor: SparseTensor, before: Any) -> Any:
    """IOS 18: a mask of bits, and the values inside it as floats, integers with scales, or indices into tables.

    The mask has the weight's shape, the values are [kept].
    """
    inside, inner = tensor.mask, tensor.inner
    mask: Any = _typed(inside.astype(np.uint8), "uint1")
    name = f"{before.name}_values"
    match inner:
        case FloatTensor():
            values: Any = inner.values[inside].astype(np.float32)
        case PaletteTensor():
            mask, values = mb.constexpr_lut_to_sparse(
                indices_mask=mask,
                indices_nonzero_data=_typed(inner.indices[inside], f"uint{inner.encoding.bits}"),
                lut=_table(inner),
                before_op=before,
                name=name,
            )
        case AffineTensor():
            # Looking up before scaling, which indices of 2 and 3 bits would need, fails before iOS 26.
            data = _typed(inner.values[inside], f"int{max(inner.encoding.bits, 4)}")
            mask, values = mb.constexpr_sparse_blockwise_shift_scale(
                data_mask=mask, nonzero_data=data, scale=inner.scale.astype(np.float32), before_op=before, name=name
            )
        case _:
            assert_never(inner)
    return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask, before_op=before, name=before.name)


def _by_channel(tensor: AffineTensor, before: Any) -> Any:
    """IOS 16 and 17: 8 bits, one scale a channel."""
    wide = [axis for axis, size in enumerate(tensor.scale.shape) if size > 1]
    scale = tensor.scale.reshape(-1).astype(np.float32)
    zero = np.zeros(scale.shape, tensor.values.dtype) if tensor.zero_point is None else tensor.zero_point.reshape(-1)
    scalar = not wide and tensor.shape[0] != 1
    return mb.constexpr_affine_dequantize(
        quantized_data=np.ascontiguousarray(tensor.values),
        zero_point=zero[0] if scalar else zero,
        scale=scale[0] if scalar else scale,
        axis=wide[0] if wide else 0,
        before_op=before,
        name=before.name,
    )


def _packed_palette(tensor: PaletteTensor, before: Any) -> Any:
    """IOS 16 and 17: one table, and indices packed by us, lowest bits first. One table of [entries]."""
    bits = tensor.encoding.bits
    stream = tensor.indices.reshape(-1, 1) >> np.arange(bits, dtype=np.uint8) & 1
    return mb.constexpr_lut_to_dense(
        indices=np.packbits(stream.reshape(-1), bitorder="little"),
        lut=tensor.table.reshape(-1).astype(np.float32),
        shape=np.array(tensor.shape, np.uint32),
        before_op=before,
        name=before.name,
    )


def _packed_sparse(tensor: SparseTensor, before: Any) -> Any:
    """IOS 16 and 17: floats, and a mask packed by us. Values of [kept]."""
    return mb.constexpr_sparse_to_dense(
        nonzero_data=tensor.inner.dequantize()[tensor.mask],
        mask=np.packbits(tensor.mask.reshape(-1), bitorder="little"),
        shape=np.array(tensor.shape, np.uint32),
        before_op=before,
        name=before.name,
    )


def _listed(tensor: AffineTensor) -> tuple[Array, Array]:
    """Integers of a width that Core ML lacks as indices into the list of all integers of that width, and the list."""
    bits, signed = tensor.encoding.bits, tensor.encoding.symmetric
    low = -(2 ** (bits - 1)) if signed else 0
    table = np.arange(low, low + 2**bits).astype(np.int8 if signed else np.uint8)
    indices = (tensor.values.astype(np.int16) - low).astype(np.uint8)
    return indices, table.reshape([1] * len(tensor.shape) + [2**bits, 1])


def _table(tensor: PaletteTensor) -> Array:
    """Tables in the axes that Core ML wants: groups of channels, one for each other axis, entries, one."""
    groups, entries = tensor.table.shape
    shape = (groups, *[1] * (len(tensor.shape) - 1), entries, 1)
    return tensor.table.astype(np.float32).reshape(shape)


def _typed(values: Array, kind: str) -> Array:
    # ``astype`` drops the metadata that tells 4 bits from 8; a view keeps it.
    return np.ascontiguousarray(values).view(types.nptype_from_builtin(types.string_to_builtin(kind)))
