"""SmoothQuant: move part of the activations' range into the weights (Xiao et al. 2022, arXiv:2211.10438)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeship.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

# Ranges below this are those of channels that are off; dividing by them would only make huge numbers.
LEAST = 1e-5


def smooth_scales(
    activation_absmax: torch.Tensor,
    weights: Sequence[torch.Tensor],
    alpha: float = 0.5,
    *,
    channels: Sequence[int] | None = None,
) -> torch.Tensor:
    """``max|X|**alpha / max|W|**(1 - alpha)`` for each input channel: what inputs are to be divided by.

    Args:
        activation_absmax: ``(K,)``, the largest absolute value of each channel over the calibration data.
        weights: ``(N, K)`` each, all layers that read the inputs.
        alpha: 0 leaves all range in the activations, 1 moves all of it into the weights.
        channels: for each of the K channels the scale that it shares with others (`Fold.channels`).

    Returns:
        One positive scale a channel, or a shared channel; 1 where the channel or its weights are always zero.

    Raises:
        UsageError: ``alpha`` outside 0..1. DataError: ranges that are not finite.
    """
    import torch

    if not 0 <= alpha <= 1:
        raise UsageError(f"a smoothing strength of {alpha} is not known", fix="use 0 to 1; 0.5 suits most models")
    seen = activation_absmax.detach().float()
    if not bool(torch.isfinite(seen).all()):
        raise DataError("activations are not finite on the calibration data", fix="remove the samples that cause them")
    reach = torch.stack([weight.detach().float().abs().amax(0) for weight in weights]).amax(0)
    if channels is not None:
        place = torch.tensor(channels)
        size = int(place.max()) + 1
        seen, reach = (torch.zeros(size).scatter_reduce_(0, place, value, "amax") for value in (seen, reach))
    scale = seen.clamp(min=LEAST) ** alpha / reach.clamp(min=LEAST) ** (1 - alpha)
    return torch.where((seen < LEAST) | (reach < LEAST), torch.ones_like(scale), scale)
