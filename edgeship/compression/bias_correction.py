"""Bias correction: rounding a layer's weights moves the mean of its outputs, and the bias takes that back.

Nagel et al. 2019 (arXiv:1906.04721), section 4.2, from calibration data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from edgeship.errors import DataError

if TYPE_CHECKING:
    import torch


def corrected_bias(
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    quantized: torch.Tensor,
    inputs: Iterable[torch.Tensor],
    *,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
    name: str = "layer",
) -> torch.Tensor:
    """``bias + E[(W - Q) x]``, ``(N,)``, the mean over samples and positions; outputs then keep the mean they had.

    Args:
        bias: None counts as zeros. weight, quantized: ``(N, K)``, or ``(O, I / groups, *kernel)`` of a convolution.
        inputs: ``(..., K)`` each, or ``(B, I, *space)`` each, samples first.

    Raises:
        DataError: no inputs, or inputs that are not finite.
    """
    import torch

    total: torch.Tensor | None = None
    count = 0
    # A linear layer's one axis, or channels and space: what belongs to one sample or token.
    own = max(weight.dim() - 1, 1)
    for value in inputs:
        flat = value.detach().double()
        # Both layers are linear: the mean input gives the mean output. Positions of an image stay apart, for its edges.
        flat = flat.reshape(-1, *flat.shape[-own:])
        total = flat.sum(0) if total is None else total + flat.sum(0)
        count += flat.shape[0]
    if total is None or count == 0:
        raise DataError(f"{name} saw no calibration data", fix="give at least one sample")
    if not bool(torch.isfinite(total).all()):
        raise DataError(f"inputs of {name} hold NaN or infinity", fix="remove the samples that cause them")
    lost = weight.detach().double() - quantized.detach().double()
    if weight.dim() == 2:
        shift = lost @ (total / count)
    else:
        run = (torch.conv1d, torch.conv2d, torch.conv3d)[weight.dim() - 3]
        options = [list(numbers) for numbers in (stride, padding, dilation)]
        answer = run((total / count)[None], lost, None, *options, groups)  # type: ignore[call-overload]
        shift = answer[0].flatten(1).mean(1)
    old = torch.zeros_like(shift) if bias is None else bias.detach().double()
    return (old + shift).float()
