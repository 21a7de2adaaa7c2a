import pytest
import torch
from torch.nn import functional

from edgeship.compression.affine import quantize_nearest
from edgeship.compression.bias_correction import corrected_bias
from edgeship.core.weights import Affine
from edgeship.errors import DataError


def rounded(weight, bits=2):
    return torch.from_numpy(quantize_nearest(weight, Affine(bits)).dequantize())


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("given", [True, False])
def test_means_of_a_linear_layer_are_kept(generator, given):
    weight = torch.randn(6, 16, generator=generator)
    bias = torch.randn(6, generator=generator) if given else None
    inputs = torch.rand(4, 10, 16, generator=generator)
    found = corrected_bias(bias, weight, rounded(weight), [inputs[:1], inputs[1:]])
    wanted = functional.linear(inputs, weight, bias).flatten(0, 1).mean(0)
    moved = functional.linear(inputs, rounded(weight), bias).flatten(0, 1).mean(0)
    assert (moved - wanted).abs().max() > 0.05
    torch.testing.assert_close(functional.linear(inputs, rounded(weight), found).flatten(0, 1).mean(0), wanted)


@pytest.mark.parametrize(
    ("shape", "image", "options"),
    [
        ((8, 4, 3, 3), (4, 9, 7), {"padding": [1, 1], "stride": [2, 1]}),
        ((8, 1, 3, 3), (8, 9, 7), {"padding": [2], "dilation": [2], "groups": 8}),
        ((6, 4, 5), (4, 20), {"padding": [2], "stride": [2]}),
        ((4, 2, 2, 3, 3), (2, 4, 6, 6), {}),
    ],
)
def test_means_of_a_convolution_are_kept_edges_included(generator, shape, image, options):
    run = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[len(shape)]
    weight, images = torch.randn(shape, generator=generator), torch.rand(5, *image, generator=generator)
    found = corrected_bias(None, weight, rounded(weight), [images[:2], images[2:]], **options)

    def mean(value, bias=None):
        return run(images, value, bias, **options).transpose(0, 1).flatten(1).mean(1)

    assert (mean(rounded(weight)) - mean(weight)).abs().max() > 0.01
    torch.testing.assert_close(mean(rounded(weight), found), mean(weight))


def test_unfit_data_is_refused():
    weight = torch.randn(2, 4)
    with pytest.raises(DataError, match="no calibration data"):
        corrected_bias(None, weight, weight, [])
    with pytest.raises(DataError, match="infinity"):
        corrected_bias(None, weight, weight, [torch.full((1, 4), torch.inf)])
