"""Other views of the same elements: reshape, transpose, squeeze ..."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from edgeship.runtimes.coreml.ops.registry import OPSET_IOS17, Call, op

if TYPE_CHECKING:
    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs


@op("reshape")
def reshape(call: Call) -> Outputs:
    """To ``shape``: -1 is what is left, 0 the size of the same axis, counted from the right since iOS 17."""
    x = call.data("x")
    wanted = call.integers("shape")
    if x.numel() == 0 and 0 in wanted and math.prod(s for s in wanted if s != -1) == 0 and len(wanted) != x.dim():
        return x.reshape(wanted)
    shift = x.dim() - len(wanted) if call.opset >= OPSET_IOS17 else 0
    sizes = []
    for i, size in enumerate(wanted):
        if size == 0:
            size = x.shape[i + shift] if 0 <= i + shift < x.dim() else 1
        sizes.append(size)
    return x.reshape(sizes)


@op("reshape_like")
def reshape_like(call: Call) -> Outputs:
    """To sizes picked from reference tensors: ``ref.shape[begin:end]``, or to its end where masked."""
    shape: list[int] = []
    bounds = zip(*(_scalars(call, name) for name in ("begins", "ends", "end_masks")), strict=True)
    for reference, (begin, end, to_end) in zip(call.tensors("ref_tensors"), bounds, strict=True):
        shape += reference.shape[begin:] if to_end else reference.shape[begin:end]
    return call.data("x").reshape(shape)


def _scalars(call: Call, name: str) -> list[int]:
    return [int(i) for tensor in call.tensors(name) for i in tensor.reshape(-1).tolist()]


@op("transpose")
def transpose(call: Call) -> Outputs:
    """Axes in the order ``perm``."""
    return call.data("x").permute(call.integers("perm"))


@op("expand_dims")
def expand_dims(call: Call) -> Outputs:
    """Axes of size 1 at the places ``axes`` of the result."""
    x = call.data("x")
    axes = call.integers("axes")
    rank = x.dim() + len(axes)
    inserted = {axis % rank for axis in axes}
    sizes = iter(x.shape)
    return x.reshape([1 if axis in inserted else next(sizes) for axis in range(rank)])


@op("squeeze")
def squeeze(call: Call) -> Outputs:
    """Without the axes of size 1 among ``axes`` (all, if not given); others stay, as in PyTorch."""
    x = call.data("x")
    axes = call.optional_integers("axes")
    chosen = range(x.dim()) if axes is None else [axis % x.dim() for axis in axes]
    return x.reshape([size for axis, size in enumerate(x.shape) if not (size == 1 and axis in chosen)])


@op("flatten2d")
def flatten2d(call: Call) -> Outputs:
    """Two axes: those before ``axis``, and the rest."""
    x = call.data("x")
    axis = call.integer("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@op("shape")
def shape(call: Call) -> Outputs:
    """The sizes of ``x``."""
    return torch.tensor(list(call.tensor("x").shape), dtype=torch.int64)


@op("reverse")
def reverse(call: Call) -> Outputs:
    """Back to front along ``axes``, or along all."""
    x = call.data("x")
    axes = call.optional_integers("axes")
    return torch.flip(x, list(range(x.dim())) if axes is None else axes)


@op("reverse_sequence")
def reverse_sequence(call: Call) -> Outputs:
    """The first ``lengths[i]`` elements along ``seq_axis`` back to front, for entry i of ``batch_axis``."""
    x = call.data("x").clone()
    batch, seq = call.axis("batch_axis", 0, x.dim()), call.axis("seq_axis", 0, x.dim())
    rows: Tensor = x.movedim((batch, seq), (0, 1))
    for row, length in zip(rows, call.integers("lengths"), strict=True):
        row[:length] = torch.flip(row[:length], [0])
    return x


@op("sliding_windows")
def sliding_windows(call: Call) -> Outputs:
    """All windows of ``size`` along ``axis``, as a new axis after it."""
    x = call.data("x")
    axis = call.axis("axis", None, x.dim())
    return x.unfold(axis, call.integer("size"), call.integer("stride", 1)).movedim(-1, axis + 1)
