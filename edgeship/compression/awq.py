"""AWQ: before rounding, enlarge the weights of input channels that carry much (Lin et al. 2023, arXiv:2306.00978).

The scale of a channel is its mean magnitude to the power ``alpha``; ``alpha`` is the one with the least squared error
at the outputs of all layers that read the inputs. The error is taken from the Hessian (``||E X||^2 = E H E^T / 2``),
so inputs are gone through once. Then each block's range is clipped to where its own part of the outputs suffers least.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from edgeship.compression.affine import choose_scales, round_to, rounding_error
from edgeship.compression.hessian import Hessian
from edgeship.compression.products import product
from edgeship.core.weights import Affine, AffineTensor
from edgeship.errors import UsageError

if TYPE_CHECKING:
    import torch

# Exponents tried: 0 (nothing moves), 1/20 ... 1, as in the paper.
GRID = 20
# Channels that carry less than this share of the mean count as carrying this: their weights must not vanish.
LEAST = 1e-4
# Ranges tried: the whole one down to half of it, as in the paper.
CLIP_STEPS = 20
CLIP_LEAST = 0.5


def search_scales(
    weights: Sequence[torch.Tensor],
    inputs: Iterable[torch.Tensor],
    encoding: Affine,
    *,
    channels: Sequence[int] | None = None,
    hessian: Hessian | None = None,
    name: str = "layer",
) -> torch.Tensor:
    """What to divide the inputs of some linear layers by, and multiply their weights by.

    Args:
        weights: ``(N, K)`` each, all layers that read the inputs. inputs: ``(..., K)`` each.
        channels: for each of the K channels the scale that it shares with others (`Fold.channels`).
        hessian: of the inputs, where it is known already.

    Returns:
        One positive scale a channel, or a shared channel; all 1 where no exponent beats plain rounding.

    Raises:
        DataError: no inputs, or not finite. EncodingError: the group size does not divide K.
    """
    import torch

    if not weights:
        raise UsageError(f"{name} has no layers to scale", fix="give the weights that read the inputs")
    columns = weights[0].shape[1]
    seen = Hessian.empty(columns)
    total = torch.zeros(columns)
    tokens = 0
    for rows in inputs:
        # [..., K] -> [tokens, K]
        flat = rows.detach().reshape(-1, columns).float()
        total += flat.abs().sum(0)
        tokens += flat.shape[0]
        if hessian is None:
            seen.add(flat)
    known = hessian or seen
    known.check(name)
    magnitude = total / max(tokens, 1)
    place = torch.arange(columns) if channels is None else torch.tensor(channels)
    size = int(place.max()) + 1
    # Channels that share a scale get the mean of their magnitudes: [K] -> [scales].
    base = torch.zeros(size).scatter_reduce_(0, place, magnitude, "mean", include_self=False)
    if not bool((base > 0).any()):
        return torch.ones(size)
    base = (base / base.mean()).clamp(min=LEAST)
    best, found = torch.inf, torch.ones(size)
    matrix = known.matrix.contiguous()
    for step in range(GRID + 1):
        scale = base ** (step / GRID)
        # Around 1, so that neither the weights nor the inputs leave their range.
        scale = scale / (scale.max() * scale.min()).sqrt()
        # [scales] -> [K]
        wide = scale[place]
        error = sum(_output_error(weight.detach().float(), wide, matrix, encoding, name) for weight in weights)
        if error < best:
            best, found = float(error), scale
    return found


def quantize_awq(
    weight: torch.Tensor, hessian: Hessian, encoding: Affine, *, clip: bool = True, name: str = "weight"
) -> AffineTensor:
    """Round a ``(N, K)`` weight, already scaled, to nearest, each range clipped to where outputs suffer least.

    Args:
        hessian: of the inputs as the layer gets them now (`divide_inputs` of those before scaling).

    Raises:
        EncodingError: the group size does not divide K. DataError: inputs that are not finite.
    """
    hessian.check(name)
    value = weight.detach().float()
    choose = clipped_scales(value, hessian, encoding, name) if clip else choose_scales(value, encoding, name=name)
    return round_to(value, *choose, encoding)


def clipped_scales(
    value: torch.Tensor, hessian: Hessian, encoding: Affine, name: str = "weight"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each block with the least squared error of the outputs that the block's inputs make.

    Unlike `choose_scales` with an importance for each channel, this counts how errors within a block add up.
    """
    import torch

    rows, columns = value.shape
    best_scale, best_zero = choose_scales(value, encoding, name=name)
    blocks = best_scale.shape[1]
    width = columns // blocks
    # [K, K] -> [blocks, width, blocks, width], of which the diagonal blocks count
    whole = hessian.matrix.reshape(blocks, width, blocks, width)
    parts = torch.stack([whole[i, :, i] for i in range(blocks)])
    best = torch.full((rows, blocks), torch.inf)
    for step in range(CLIP_STEPS):
        share = 1 - step * (1 - CLIP_LEAST) / CLIP_STEPS
        scale, zero = choose_scales(value * share, encoding, name=name)
        # [N, K] -> [blocks, N, width]
        error = rounding_error(value, scale, zero, encoding).reshape(rows, blocks, width).transpose(0, 1)
        # e H e' for each row and block: [N, blocks]
        cost = (torch.bmm(error, parts) * error).sum(2).T
        if encoding.granularity == "tensor":
            cost = cost.sum().expand_as(cost)
        better = cost < best
        best = torch.where(better, cost, best)
        where = better[:1] if scale.shape[0] == 1 else better
        best_scale, best_zero = torch.where(where, scale, best_scale), torch.where(where, zero, best_zero)
    return best_scale, best_zero


def divide_inputs(hessian: Hessian, scale: torch.Tensor) -> Hessian:
    """The Hessian of inputs divided by ``scale``, ``(K,)``."""
    return Hessian(hessian.matrix.reshape(hessian.upper.shape) / scale / scale[:, None], hessian.tokens)


def _output_error(value: torch.Tensor, scale: torch.Tensor, matrix: torch.Tensor, encoding: Affine, name: str) -> float:
    """The squared error of the outputs when a weight is rounded after scaling.

    ``value`` [N, K], ``scale`` [K], ``matrix`` [K, K].
    """
    scaled = value * scale
    error = rounding_error(scaled, *choose_scales(scaled, encoding, name=name), encoding) / scale
    # A Hessian is its own transpose.
    return float((product(error.contiguous(), matrix) * error).double().sum())
