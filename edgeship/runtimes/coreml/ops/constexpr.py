"""Compressed constants, decompressed once when a program is opened.

Until iOS 17 indices and masks are packed in bytes beside an explicit shape; since iOS 18 they are tensors of few bits,
which the reader of the weight file has unpacked.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from edgeship.errors import ArtifactError
from edgeship.runtimes.coreml.ops.registry import TORCH_DTYPES, Call, op
from edgeship.runtimes.coreml.storage import unpack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs


def spread(parameter: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeats each entry over its block, so that the first axes of ``parameter`` get the sizes ``shape``."""
    for axis, size in enumerate(shape):
        blocks = parameter.shape[axis]
        if blocks not in (1, size):
            if size % blocks:
                raise ArtifactError(f"{blocks} blocks do not divide an axis of {size}", fix="build the package again")
            parameter = parameter.repeat_interleave(size // blocks, dim=axis)
    return parameter.expand(*shape, *parameter.shape[len(shape) :])


def shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """``scale (data - offset)`` in float32. Shapes broadcast."""
    values = data.to(torch.float32)
    if offset is not None:
        values = values - offset.to(torch.float32)
    return values * scale.to(torch.float32)


def look_up(indices: Tensor, lut: Tensor, vector_axis: int | None) -> Tensor:
    """``lut[group][index]``: ``lut`` has the axes of ``indices`` (groups), then entries, then the vector."""
    groups = lut.shape[:-2]
    vector = lut.shape[-1]
    if math.prod(groups) == 1:
        values = lut.reshape(-1, vector)[indices.to(torch.int64)]
    else:
        # The group of every element, as a row of the table of all entries.
        ids = torch.arange(math.prod(groups), dtype=torch.int32).reshape(groups)
        rows = spread(ids, indices.shape) * lut.shape[-2] + indices.to(torch.int32)
        values = lut.reshape(-1, vector)[rows.to(torch.int64)]
    if vector == 1:
        return values.squeeze(-1)
    axis = (vector_axis or 0) % indices.dim()
    return values.movedim(-1, axis + 1).flatten(axis, axis + 1)


def fill_in(mask: Tensor, nonzero: Tensor) -> Tensor:
    """Zeros in the shape of ``mask``, with ``nonzero`` in row-major order where the mask is set."""
    dense = torch.zeros(mask.shape, dtype=nonzero.dtype)
    dense[mask.to(torch.bool)] = nonzero
    return dense


def unpack_bits(call: Call, name: str, bits: int, shape: Sequence[int]) -> Tensor:
    """A packed iOS 16 parameter as a tensor of ``shape``."""
    packed = call.tensor(name).reshape(-1).numpy().view("uint8")
    return torch.from_numpy(unpack(packed, f"uint{bits}", math.prod(shape)).copy()).reshape(list(shape))


@op("constexpr_affine_dequantize")
def affine_dequantize(call: Call) -> Outputs:
    """``scale (quantized_data - zero_point)``, by tensor or along ``axis``."""
    data = call.tensor("quantized_data")
    scale, zero_point = (_along(call, name, data.dim()) for name in ("scale", "zero_point"))
    return shift_scale(data, scale, zero_point)


def _along(call: Call, name: str, rank: int) -> Tensor:
    """A scalar, or one number an index along ``axis``, shaped to the weight's rank."""
    parameter = call.tensor(name)
    if parameter.dim() == 0:
        return parameter
    axis = call.axis("axis", None, rank)
    return parameter.reshape([-1 if i == axis else 1 for i in range(rank)])


@op("constexpr_blockwise_shift_scale")
def blockwise_shift_scale(call: Call) -> Outputs:
    """``scale (data - offset)``, each entry of scale and offset for one block of data."""
    data = call.tensor("data")
    scale = spread(call.tensor("scale"), data.shape)
    offset = spread(call.tensor("offset"), data.shape) if call.has("offset") else None
    return shift_scale(data, scale, offset)


@op("constexpr_lut_to_dense")
def lut_to_dense(call: Call) -> Outputs:
    """A palette: one table for all (iOS 16), or by group and with vectors for entries (iOS 18)."""
    lut = call.tensor("lut")
    if call.has("shape"):
        shape = call.integers("shape")
        bits = max(1, math.ceil(math.log2(lut.numel())))
        return lut.reshape(-1)[unpack_bits(call, "indices", bits, shape).to(torch.int64)]
    return look_up(call.tensor("indices"), lut, _vector_axis(call))


@op("constexpr_sparse_to_dense")
def sparse_to_dense(call: Call) -> Outputs:
    """Zeros but for ``nonzero_data`` where the mask has a bit set."""
    if call.has("shape"):
        return fill_in(unpack_bits(call, "mask", 1, call.integers("shape")), call.tensor("nonzero_data"))
    return fill_in(call.tensor("mask"), call.tensor("nonzero_data"))


@op("constexpr_lut_to_sparse")
def lut_to_sparse(call: Call) -> Outputs:
    """A palette of the elements that are not zero: the mask (of the vectors' size) and their values."""
    mask, axis = call.tensor("indices_mask"), _vector_axis(call)
    lut = call.tensor("lut")
    dense = look_up(fill_in(mask, call.tensor("indices_nonzero_data")), lut, axis)
    if lut.shape[-1] > 1:
        mask = mask.repeat_interleave(lut.shape[-1], dim=(axis or 0) % mask.dim())
    return mask, dense[mask.to(torch.bool)]


@op("constexpr_sparse_blockwise_shift_scale")
def sparse_blockwise_shift_scale(call: Call) -> Outputs:
    """Shift and scale of the elements that are not zero: the mask and their values."""
    mask = call.tensor("data_mask")
    chosen = mask.to(torch.bool)
    scale = spread(call.tensor("scale"), mask.shape)[chosen]
    offset = spread(call.tensor("offset"), mask.shape)[chosen] if call.has("offset") else None
    return mask, shift_scale(call.tensor("nonzero_data"), scale, offset)


@op("constexpr_cast")
def constexpr_cast(call: Call) -> Outputs:
    """A constant stored as float16 and used as float32."""
    return call.tensor("source_val").to(TORCH_DTYPES[call.outputs[0].type.dtype])


def _vector_axis(call: Call) -> int | None:
    return call.integer("vector_axis") if call.has("vector_axis") else None
