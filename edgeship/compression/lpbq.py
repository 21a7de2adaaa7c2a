"""Group scales on the grid that Hexagon computes with: a unit for each channel, times an integer from 1 to 15.

Qualcomm calls it low-power block quantization (LPBQ; QNN's ``BLOCKWISE_EXPANSION``). Units have at most four
significant bits here, so that the product has eight at most, and bfloat16, float16 and float32 files hold it exactly:
one choice of numbers serves Hexagon and every other runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeship.compression.affine import MAX_SCALE, MIN_SCALE, choose_scales, round_to, rounding_error
from edgeship.core.weights import Affine, AffineTensor
from edgeship.errors import EncodingError, WeightsError

if TYPE_CHECKING:
    import torch

MAX_STEP = 15
# Four significant bits: every unit between two powers of two, and the next such ones.
MANTISSAS = tuple(power * (1 + n / 8) for power in (1, 2) for n in range(8))


def quantize_npu_block(
    weight: torch.Tensor,
    encoding: Affine,
    *,
    axis: int = 0,
    clip: bool = False,
    importance: torch.Tensor | None = None,
    name: str = "weight",
) -> AffineTensor:
    """`affine.quantize_nearest` for symmetric groups, with scales that Hexagon holds.

    Raises:
        EncodingError: not symmetric groups, or the group size does not divide the input channels.
        WeightsError: the weight is not finite, or too large for a float16 scale.
    """
    import torch

    value = weight.detach().to(torch.float32)
    if not bool(torch.isfinite(value).all()):
        raise WeightsError(f"{name} holds NaN or infinity", fix="train or export the model again")
    scale, zero = choose_scales(value, encoding, axis=axis, clip=clip, importance=importance, name=name)
    return round_to(value, to_npu_grid(value, scale, encoding, importance=importance, name=name), zero, encoding)


def to_npu_grid(
    value: torch.Tensor,
    scale: torch.Tensor,
    encoding: Affine,
    *,
    importance: torch.Tensor | None = None,
    name: str = "weight",
) -> torch.Tensor:
    """Group scales, however chosen, moved to Hexagon's grid; the shape of ``scale``.

    Each group takes the step below or above its scale, and each channel the unit, that give the least squared rounding
    error of its weights.

    Args:
        value: (N, K), the weight. scale: (N, K / group).
        importance: ``(K,)`` weight of each input channel in that error.
    """
    import torch

    if not encoding.symmetric or encoding.granularity != "group" or scale.dim() != 2:
        raise EncodingError(
            f"Hexagon has no grid for {encoding} of {name}", fix="use symmetric groups of a linear layer"
        )
    free = scale.double()
    # [N, 1]
    largest = free.amax(1, keepdim=True)
    # The largest power of two of which MAX_STEP steps do not reach beyond the largest scale.
    power = 2.0 ** torch.floor(torch.log2(largest / MAX_STEP))
    best, least = torch.zeros_like(scale), torch.full_like(largest, torch.inf)
    for mantissa in MANTISSAS:
        unit = power * mantissa
        # Twice the power always reaches the largest group.
        unit = torch.where(unit * MAX_STEP >= largest, unit, 2 * power).clamp(min=MIN_SCALE)
        low, high = (
            (steps.clamp(1, MAX_STEP) * unit).float() for steps in ((free / unit).floor(), (free / unit).ceil())
        )
        # Both neighbours of each group's scale: [N, groups] each.
        errors = [_errors(value, steps, encoding, importance) for steps in (low, high)]
        total = torch.minimum(*errors).sum(1, keepdim=True)
        best = torch.where(total < least, torch.where(errors[1] < errors[0], high, low), best)
        least = torch.minimum(total, least)
    if float(best.max()) > MAX_SCALE:
        raise WeightsError(f"{name} is too large for a float16 scale", fix="scale the layer, or keep it in float32")
    return best


def _errors(
    value: torch.Tensor, scale: torch.Tensor, encoding: Affine, importance: torch.Tensor | None
) -> torch.Tensor:
    """Squared rounding errors summed over each group, (N, G)."""
    error = rounding_error(value, scale, None, encoding).double().square()
    if importance is not None:
        error = error * importance
    # [N, K] -> [N, groups, group] -> [N, groups]
    return error.reshape(*scale.shape, -1).sum(2)
