"""Group scales for Hexagon: on its grid, storable everywhere, and little worse than free ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeship.compression.affine import quantize_nearest
from edgeship.compression.lpbq import MAX_STEP, quantize_npu_block, to_npu_grid
from edgeship.core.weights import Affine
from edgeship.errors import EncodingError, WeightsError
from edgeship.lowering.qnn.blocks import factors

GROUP = Affine(4, granularity="group", group_size=32)


def weights(spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(48, 256, generator=generator)
    return rows * torch.rand(48, 1, generator=generator).mul(spread).exp()


def error(weight: torch.Tensor, tensor) -> float:
    return float(
        (weight - torch.from_numpy(tensor.dequantize())).square().mean().sqrt() / weight.square().mean().sqrt()
    )


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("encoding", [GROUP, Affine(3, granularity="group", group_size=64)])
def test_scales_are_steps_of_a_unit_and_storable_everywhere(encoding, clip):
    tensor = quantize_npu_block(weights(5), encoding, clip=clip)
    unit, steps = factors(tensor.scale.T)
    assert np.array_equal(steps * unit, tensor.scale.T)
    assert steps.min() >= 1
    assert steps.max() <= MAX_STEP
    scale = torch.from_numpy(tensor.scale)
    assert torch.equal(scale.to(torch.bfloat16).float(), scale)
    assert torch.equal(scale.to(torch.float16).float(), scale)


def test_it_costs_a_tenth_of_the_error_at_most():
    weight = weights()
    assert error(weight, quantize_npu_block(weight, GROUP)) < 1.1 * error(weight, quantize_nearest(weight, GROUP))


def test_groups_of_very_different_size_and_of_zeros():
    weight = weights()
    weight[3, :32] = 0
    weight[4, 32:64] *= 1000
    weight[5] = 0
    tensor = quantize_npu_block(weight, GROUP)
    factors(tensor.scale.T)
    assert not tensor.values[5].any()
    assert np.isfinite(tensor.dequantize()).all()


def test_scales_of_others_are_moved_with_their_weights_in_mind():
    weight = weights()
    free = torch.from_numpy(quantize_nearest(weight, GROUP, clip=True).scale)
    moved = to_npu_grid(weight, free, GROUP, importance=torch.ones(256))
    assert 0.5 < float((moved / free).min()) <= float((moved / free).max()) < 2


def test_free_scales_are_told_apart():
    with pytest.raises(EncodingError, match="npu_block"):
        factors(quantize_nearest(weights(), GROUP).scale.T, "layer.weight")


@pytest.mark.parametrize("encoding", [Affine(4), Affine(4, False, "group", 32)])
def test_other_encodings_are_refused(encoding):
    with pytest.raises(EncodingError, match="symmetric groups"):
        quantize_npu_block(weights(), encoding)


def test_what_is_not_finite_is_refused():
    with pytest.raises(WeightsError, match="NaN"):
        quantize_npu_block(torch.full((4, 32), torch.nan), GROUP)
