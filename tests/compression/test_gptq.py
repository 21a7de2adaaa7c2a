import numpy as np
import pytest
import torch

from edgeship.compression.affine import quantize_nearest
from edgeship.compression.gptq import hessian_of, quantize_gptq
from edgeship.core.weights import Affine
from edgeship.errors import EncodingError


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 128, generator=generator) * torch.rand(1, 128, generator=generator)
    mix = torch.randn(128, 128, generator=generator) / 11
    return weight, torch.randn(1024, 128, generator=generator) @ mix


def output_error(weight, inputs, made):
    return float(((torch.from_numpy(made.dequantize()) - weight) @ inputs.T).square().mean())


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize(
    "encoding", [Affine(4, True, "group", 32), Affine(4, False, "group", 32), Affine(4), Affine(3, False, "group", 64)]
)
def test_outputs_move_much_less_than_by_rounding(layer, encoding, order):
    weight, inputs = layer
    made = quantize_gptq(weight, hessian_of([inputs], 128), encoding, act_order=order)
    assert output_error(weight, inputs, made) < 0.7 * output_error(weight, inputs, quantize_nearest(weight, encoding))
    assert made.values.min() >= encoding.low
    assert made.values.max() <= encoding.high


def test_with_independent_inputs_it_is_rounding(layer):
    weight, _ = layer
    identity = hessian_of([torch.eye(128)], 128)
    made = quantize_gptq(weight, identity, Affine(8), clip=False)
    np.testing.assert_array_equal(made.values, quantize_nearest(weight, Affine(8)).values)


def test_dead_channels_and_few_tokens_still_give_finite_weights(layer):
    weight, inputs = layer
    few = inputs[:4].clone()
    few[:, :16] = 0
    made = quantize_gptq(weight, hessian_of([few], 128), Affine(4, True, "group", 32))
    assert np.isfinite(made.dequantize()).all()


def test_batches_add_up(layer):
    _, inputs = layer
    whole, parts = hessian_of([inputs], 128), hessian_of([inputs[:300], inputs[300:]], 128)
    torch.testing.assert_close(whole.matrix, parts.matrix, rtol=1e-4, atol=1e-2)
    assert whole.tokens == parts.tokens == 1024


def test_a_group_that_does_not_divide_is_refused(layer):
    weight, inputs = layer
    with pytest.raises(EncodingError, match="does not divide"):
        quantize_gptq(weight[:, :100], hessian_of([inputs[:, :100]], 100), Affine(4, True, "group", 64))
