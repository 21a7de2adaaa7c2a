import pytest
import torch

from edgeship.compression.affine import quantize_nearest
from edgeship.compression.awq import clipped_scales, divide_inputs, quantize_awq, search_scales
from edgeship.compression.hessian import hessian_of
from edgeship.compression.smoothquant import smooth_scales
from edgeship.core.weights import Affine
from edgeship.errors import DataError, EncodingError, UsageError

ENCODINGS = [Affine(4, True, "group", 32), Affine(4, False, "group", 32), Affine(3), Affine(4, True, "tensor")]


@pytest.fixture(scope="module")
def layers():
    """Two layers that read the same inputs, a few channels of which carry most."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 64, generator=generator) for rows in (48, 24)]
    inputs = torch.randn(500, 64, generator=generator) * torch.rand(64, generator=generator).pow(4).mul(20)
    return weights, inputs


def output_error(weight, inputs, made, scale=1.0):
    return float((((torch.from_numpy(made.dequantize()) / scale) - weight) @ inputs.T).square().sum())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_scaled_and_rounded_layers_answer_closer_than_rounded_ones(layers, encoding):
    weights, inputs = layers
    scale = search_scales(weights, [inputs[:200], inputs[200:]], encoding)
    hessian = divide_inputs(hessian_of([inputs], 64), scale)
    plain = sum(output_error(weight, inputs, quantize_nearest(weight, encoding)) for weight in weights)
    unclipped, ours = (
        sum(output_error(w, inputs, quantize_awq(w * scale, hessian, encoding, clip=clip), scale) for w in weights)
        for clip in (False, True)
    )
    assert unclipped < 0.8 * plain
    assert ours <= unclipped * 1.0001


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_ranges_are_the_best_of_those_tried_for_the_outputs_of_a_block(layers, encoding):
    weights, inputs = layers
    mixed = inputs @ torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    hessian = hessian_of([mixed], 64)
    scale, zero = clipped_scales(weights[0], hessian, encoding)
    plain = quantize_nearest(weights[0], encoding)
    assert scale.shape == plain.scale.shape == zero.shape
    assert (scale.numpy() <= plain.scale).all()
    assert (scale.numpy() < plain.scale).any()


def test_inputs_that_are_alike_are_left_alone(layers):
    scale = search_scales(layers[0], [torch.eye(64)], Affine(4))
    torch.testing.assert_close(scale, torch.ones(64))


def test_a_known_hessian_gives_the_same_scales(layers):
    weights, inputs = layers
    known = search_scales(weights, [inputs], Affine(4), hessian=hessian_of([inputs], 64))
    torch.testing.assert_close(known, search_scales(weights, [inputs], Affine(4)))


def test_channels_that_share_a_scale_and_dead_ones(layers):
    weights, inputs = layers
    dead = inputs.clone()
    dead[:, :8] = 0
    shared = search_scales(weights, [dead], Affine(4), channels=[i // 2 for i in range(64)])
    assert shared.shape == (32,)
    assert (torch.isfinite(shared) & (shared > 0)).all()
    torch.testing.assert_close(search_scales(weights, [torch.zeros(3, 64)], Affine(4)), torch.ones(64))


def test_unfit_data_and_groups_are_refused(layers):
    weights, inputs = layers
    with pytest.raises(DataError, match="no calibration data"):
        search_scales(weights, [], Affine(4))
    with pytest.raises(DataError, match="infinity"):
        search_scales(weights, [inputs * torch.inf], Affine(4))
    with pytest.raises(EncodingError, match="does not divide"):
        search_scales(weights, [inputs], Affine(4, True, "group", 128))
    with pytest.raises(UsageError, match="no layers"):
        search_scales([], [inputs], Affine(4))


def test_smoothing_is_the_formula_of_the_paper():
    activation = torch.tensor([16.0, 1.0, 0.0, 4.0])
    weights = [torch.tensor([[0.5, 1.0, 1.0, 0.0]]), torch.tensor([[-4.0, 0.25, 1.0, 0.0]])]
    # max|X| ** 0.5 / max|W| ** 0.5; a dead channel and one without weights keep theirs
    torch.testing.assert_close(smooth_scales(activation, weights), torch.tensor([2.0, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(smooth_scales(activation, weights, 1.0)[:2], torch.tensor([16.0, 1.0]))
    together = smooth_scales(activation, weights, channels=[0, 0, 1, 1])
    torch.testing.assert_close(together, torch.tensor([2.0, 2.0]))


def test_unfit_smoothing_is_refused():
    with pytest.raises(UsageError, match="strength"):
        smooth_scales(torch.ones(2), [torch.ones(1, 2)], 1.5)
    with pytest.raises(DataError, match="not finite"):
        smooth_scales(torch.tensor([torch.inf, 1.0]), [torch.ones(1, 2)])
