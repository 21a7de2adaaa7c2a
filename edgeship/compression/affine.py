"""Round to nearest on an affine grid, with scales on the grid that artifacts store.

Symmetric scales are ``max|w| / high`` over each block (Krishnamoorthi 2018, arXiv:1806.08342, narrow range); the scale
is rounded to the storage grid *before* the weights are, so that the stored numbers are the decided ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeship.core.weights import Affine, AffineTensor, FloatTensor
from edgeship.errors import EncodingError, WeightsError

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

# Below this a float16 scale is subnormal, and the runtimes do not agree on those.
MIN_SCALE = 2.0**-14
MAX_SCALE = 65504.0
# Clipping tries this many ranges, from the whole one down to 1 - CLIP_LEAST of it.
CLIP_STEPS = 40
CLIP_LEAST = 0.6


def to_float16(weight: torch.Tensor, name: str = "weight") -> FloatTensor:
    """The weight rounded to float16. Raises `WeightsError` when a value does not fit. Any shape."""
    import torch

    half = weight.detach().to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise WeightsError(f"{name} has values beyond float16's 65504", fix="scale the layer, or keep it in float32")
    return FloatTensor(half.numpy())


def quantize_nearest(
    weight: torch.Tensor,
    encoding: Affine,
    *,
    axis: int = 0,
    clip: bool = False,
    importance: torch.Tensor | None = None,
    name: str = "weight",
) -> AffineTensor:
    """Round a weight to the nearest point of an affine grid.

    Args:
        weight: any shape. axis: the axis of output channels.
        clip: choose ranges by squared error instead of by the largest weight.
        importance: ``(K,)`` weight of each input channel in that error.
        encoding: granularity ``group`` runs along the other axes flattened and needs a 2-D weight.

    Raises:
        WeightsError: the weight is not finite, or too large for a float16 scale.
        EncodingError: the group size does not divide the input channels.
    """
    import torch

    value = weight.detach().to(torch.float32)
    # NaN passes through both ends: one reading, and no mask as large as the weight.
    if not all(torch.isfinite(end) for end in torch.aminmax(value)):
        raise WeightsError(f"{name} holds NaN or infinity", fix="train or export the model again")
    scale, zero = choose_scales(value, encoding, axis=axis, clip=clip, importance=importance, name=name)
    return round_to(value, scale, zero, encoding)


def round_to(value: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, encoding: Affine) -> AffineTensor:
    """Every weight to the nearest point of a grid that is given, one scale and zero point a block.

    ``value`` any shape; ``scale`` and ``zero`` of its rank, one entry a block: [out, in] -> [out, in / group, group].
    """
    import torch

    blocks = _blocked(value, scale)
    if blocks is None:
        # Scales that no reshape lays out: they are repeated to the shape of the weight.
        quantized = value / spread(scale, value.shape)
        offset = spread(zero, value.shape)
    else:
        # [out, blocks, size] / [out, blocks, 1]
        quantized, offset = blocks / scale[..., None], zero[..., None]
    quantized.round_()
    if not encoding.symmetric:
        quantized += offset
    quantized = quantized.clamp_(encoding.low, encoding.high).reshape(value.shape)
    dtype = torch.int8 if encoding.symmetric else torch.uint8
    zeros: npt.NDArray[Any] | None = None if encoding.symmetric else zero.to(dtype).numpy()
    return AffineTensor(quantized.to(dtype).numpy(), scale.numpy(), zeros, encoding)


def _blocked(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
    """A matrix as ``[rows, blocks, size]``, so that scales need not be repeated; None for other scales."""
    if value.dim() != 2 or scale.shape[0] != value.shape[0]:
        return None
    # [out, in] -> [out, blocks, in / blocks]
    return value.reshape(*scale.shape, -1)


def choose_scales(
    value: torch.Tensor,
    encoding: Affine,
    *,
    axis: int = 0,
    clip: bool = False,
    importance: torch.Tensor | None = None,
    name: str = "weight",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each block, on the grid that artifacts store.

    Args:
        clip: shrink each block's range to where the squared rounding error is smallest, instead of covering all of it.
        importance: ``(K,)`` weight of each input channel in that error (the diagonal of a Hessian); implies ``clip``.
    """
    import torch

    low, high = block_range(value, encoding, axis, name)
    if not encoding.symmetric:
        low, high = low.clamp(max=0), high.clamp(min=0)

    def grid(share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of each block, with ranges cut to ``share``; [out, 1] or [out, in / group]."""
        if encoding.symmetric:
            found = storage_grid(torch.maximum(low.abs(), high.abs()) * share / encoding.high, encoding, name)
            return found, torch.zeros_like(found)
        found = storage_grid((high - low) * share / encoding.high, encoding, name)
        return found, (-low * share / found).round().clamp(encoding.low, encoding.high)

    # Covering everything is the first of the ranges that are tried.
    best_scale, best_zero = grid(1.0)
    if not clip and importance is None:
        return best_scale, best_zero
    best = torch.full_like(best_scale, torch.inf)
    for step in range(CLIP_STEPS):
        scale, zero = grid(1.0 - step * CLIP_LEAST / CLIP_STEPS)
        error = rounding_error(value, scale, zero, encoding).square()
        if importance is not None:
            error = error * importance
        # [out, in] -> [out, blocks]
        total = _block_sum(error, best_scale.shape)
        better = total < best
        best = torch.where(better, total, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def rounding_error(
    value: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, encoding: Affine
) -> torch.Tensor:
    """What a weight gains on a grid, number by number. ``scale``, ``zero``: one a block; None is zero point 0.

    The result has the shape of ``value``.
    """
    wide = spread(scale, value.shape)
    integers = (value / wide).round_()
    if zero is None:
        return integers.clamp_(encoding.low, encoding.high).mul_(wide).sub_(value)
    shift = spread(zero, value.shape)
    return integers.add_(shift).clamp_(encoding.low, encoding.high).sub_(shift).mul_(wide).sub_(value)


def _block_sum(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Sums over blocks, one entry a block, with the rank kept.

    [out, in] -> [out, in / group], where ``shape`` says so.
    """
    for axis, (have, want) in enumerate(zip(value.shape, shape, strict=True)):
        if have != want:
            blocks = (*value.shape[:axis], want, have // want, *value.shape[axis + 1 :])
            value = value.reshape(blocks).sum(axis + 1)
    return value


def block_range(value: torch.Tensor, encoding: Affine, axis: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of each block, with the rank of ``value`` and one entry a block.

    [out, in] -> [out, 1] by channel, [out, in / group] by group.
    """
    if encoding.granularity == "tensor":
        shape = [1] * value.dim()
        return value.amin().reshape(shape), value.amax().reshape(shape)
    if encoding.granularity == "channel":
        axes = [i for i in range(value.dim()) if i != axis]
        return value.amin(axes, keepdim=True), value.amax(axes, keepdim=True)
    group = encoding.group_size or 0
    if axis != 0 or value.shape[1] % group:
        raise EncodingError(
            f"group size {group} does not divide the {value.shape[1]} input channels of {name}",
            fix="use per-channel scales for this layer",
        )
    # [out, in, ...] -> [out, in / group, group, ...]
    blocked = value.reshape(value.shape[0], value.shape[1] // group, group, *value.shape[2:])
    return blocked.amin(2), blocked.amax(2)


def storage_grid(scale: torch.Tensor, encoding: Affine, name: str = "weight") -> torch.Tensor:
    """Scales rounded to what artifacts store: bfloat16 for groups, float16 otherwise; channels of zeros the largest
    scale beside them (they store nothing, and must not widen the range of scales), or 1.

    Scales too small for a normal float16 are raised to the smallest one: their weights are then that much finer than
    they need be, and still exact.
    """
    import torch

    if float(scale.max()) > MAX_SCALE:
        raise WeightsError(f"{name} is too large for a float16 scale", fix="scale the layer, or keep it in float32")
    idle = scale.max() if float(scale.max()) > 0 else torch.ones_like(scale.max())
    scale = torch.where(scale == 0, idle, scale).clamp(min=MIN_SCALE)
    grid = torch.bfloat16 if encoding.granularity == "group" else torch.float16
    rounded = scale.to(grid).to(torch.float32)
    return torch.where(rounded > MAX_SCALE, torch.full_like(rounded, MAX_SCALE), rounded)


def spread(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """One number a block, repeated to ``shape``."""
    for axis, (have, want) in enumerate(zip(blocks.shape, shape, strict=True)):
        if have not in (1, want):
            blocks = blocks.repeat_interleave(want // have, dim=axis)
    return blocks.expand(shape)
