"""Encoded weights: the numbers that are decided are the numbers that come back, and a difference is seen."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeship.compression.affine import MIN_SCALE, quantize_nearest, to_float16
from edgeship.core.weights import ActivationEncoding, Affine, AffineTensor, Float, FloatTensor, rebuild, same_numbers
from edgeship.errors import EncodingError, WeightsError

encodings = st.builds(
    Affine, st.sampled_from([2, 3, 4, 8]), st.booleans(), st.sampled_from(["tensor", "channel"])
) | st.builds(
    lambda bits, symmetric, size: Affine(bits, symmetric, "group", size),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
    st.sampled_from([2, 4, 8]),
)


@st.composite
def cases(draw):
    encoding = draw(encodings)
    rows, columns = draw(st.integers(1, 5)), 8 * draw(st.integers(1, 3))
    seed, spread = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([1e-3, 1.0, 300.0]))
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * spread
    if draw(st.booleans()):
        values[draw(st.integers(0, rows - 1))] = 0
    return torch.from_numpy(values), encoding


@given(cases())
def test_numbers_lie_where_every_runtime_can_store_them(case):
    weight, encoding = case
    made = quantize_nearest(weight, encoding)
    assert made.values.dtype == (np.int8 if encoding.symmetric else np.uint8)
    assert encoding.low <= made.values.min()
    assert made.values.max() <= encoding.high
    assert (made.zero_point is None) == encoding.symmetric
    scale = torch.from_numpy(made.scale)
    grid = torch.bfloat16 if encoding.granularity == "group" else torch.float16
    assert torch.equal(scale, scale.to(grid).float())
    assert torch.equal(scale, scale.to(torch.float16).float())
    assert made.scale.min() >= MIN_SCALE
    assert made.scale.dtype == np.float32


@given(cases())
def test_no_number_moves_further_than_half_a_step(case):
    weight, encoding = case
    made = quantize_nearest(weight, encoding)
    steps = np.broadcast_to(np.repeat(made.scale, weight.shape[1] // made.scale.shape[1], axis=1), weight.shape)
    # Rounding a scale down to its grid (2**-9 of it for bfloat16) can cut the largest number by high * 2**-9 steps.
    span = encoding.high if encoding.symmetric else encoding.high + 1
    rounding = 2.0**-9 if encoding.granularity == "group" else 2.0**-11
    allowed = 0.5 + span * rounding + (0.5 if not encoding.symmetric else 0)
    assert (np.abs(made.dequantize() - weight.numpy()) <= allowed * steps * 1.0001).all()


@given(cases())
def test_zeros_stay_zero(case):
    weight, encoding = case
    weight[0] = 0
    assert (quantize_nearest(weight, encoding).dequantize()[weight.numpy() == 0] == 0).all()


@given(cases())
def test_arrays_and_encoding_make_the_same_tensor_again(case):
    weight, encoding = case
    made = quantize_nearest(weight, encoding)
    again = rebuild(encoding, made.arrays())
    assert same_numbers(made, again) == ""
    assert np.array_equal(made.dequantize(), again.dequantize())


@given(cases(), st.sampled_from(["values", "scale", "zero_point"]), st.integers(0, 10**6))
def test_one_changed_number_is_seen(case, role, place):
    weight, encoding = case
    made = quantize_nearest(weight, encoding)
    arrays = {key: array.copy() for key, array in made.arrays().items()}
    if role not in arrays:
        role = "values"
    flat = arrays[role].reshape(-1)
    place %= flat.size
    flat[place] = np.nextafter(flat[place], np.float32(np.inf)) if role == "scale" else flat[place] ^ 1
    assert same_numbers(made, rebuild(encoding, arrays)) == f"{role}: 1 of {flat.size} numbers differ"


def test_other_kinds_of_difference_are_seen():
    eight = quantize_nearest(torch.ones(2, 4), Affine(8))
    assert "decided int8 per channel, stored float32" in same_numbers(eight, FloatTensor(np.ones((2, 4), np.float32)))
    whole = quantize_nearest(torch.ones(2, 4), Affine(8, granularity="tensor"))
    assert same_numbers(eight, whole) == "scale: shape (2, 1) decided, (1, 1) stored"
    uneven = quantize_nearest(torch.ones(2, 4), Affine(8, symmetric=False))
    assert "zero_point" in same_numbers(eight, uneven)
    half, single = FloatTensor(np.ones((2, 2), np.float16)), FloatTensor(np.ones((2, 2), np.float32))
    assert same_numbers(half, single) != ""
    turned = AffineTensor(eight.values.reshape(4, 2), np.ones((4, 1), np.float32), None, Affine(8))
    assert "shape" in same_numbers(eight, turned)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_scale_a_channel_follows_the_axis(axis):
    weight = torch.tensor([[1.0, 20.0], [300.0, 4000.0]])
    made = quantize_nearest(weight, Affine(8), axis=axis)
    assert made.scale.shape == ((2, 1) if axis == 0 else (1, 2))
    assert np.allclose(made.scale.reshape(-1) * 127, weight.amax(1 - axis).numpy(), rtol=1e-3)


def test_symmetric_integers_use_the_narrow_range():
    made = quantize_nearest(torch.tensor([[-8.0, 8.0, 0.1]]), Affine(4))
    assert made.values.tolist() == [[-7, 7, 0]]


def test_an_asymmetric_grid_uses_both_ends():
    made = quantize_nearest(torch.tensor([[0.0, 1.0, 3.0]]), Affine(8, symmetric=False))
    assert made.values.tolist() == [[0, 85, 255]]
    assert made.zero_point.tolist() == [[0]]


def test_packed_bytes_are_counted():
    weight = torch.randn(4, 16)
    assert quantize_nearest(weight, Affine(4)).stored_bytes == 32 + 2 * 4
    assert quantize_nearest(weight, Affine(4, True, "group", 8)).stored_bytes == 32 + 2 * 8
    assert quantize_nearest(weight, Affine(8, symmetric=False)).stored_bytes == 64 + 2 * 4 + 4
    assert to_float16(weight).stored_bytes == 128


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad):
    with pytest.raises(WeightsError, match=r"layer\.weight holds NaN"):
        quantize_nearest(torch.tensor([[1.0, bad]]), Affine(8), name="layer.weight")


def test_what_does_not_fit_float16_is_named():
    with pytest.raises(WeightsError, match=r"layer\.weight has values beyond"):
        to_float16(torch.tensor([1e6]), "layer.weight")
    with pytest.raises(WeightsError, match="too large for a float16 scale"):
        quantize_nearest(torch.tensor([[1e9]]), Affine(8))


def test_groups_that_do_not_divide_are_named():
    with pytest.raises(EncodingError, match="group size 3 does not divide the 8 input channels of w"):
        quantize_nearest(torch.randn(2, 8), Affine(4, True, "group", 3), name="w")


@pytest.mark.parametrize(
    "make",
    [lambda: Affine(5), lambda: Affine(granularity="group"), lambda: Affine(group_size=4), lambda: Float(8),
     lambda: AffineTensor(np.zeros((4, 4), np.int8), np.ones((3, 1), np.float32), None, Affine()),
     lambda: AffineTensor(np.zeros((4, 4), np.int8), np.ones(4, np.float32), None, Affine()),
     lambda: AffineTensor(np.zeros((4, 4), np.uint8), np.ones((4, 1), np.float32), None, Affine(symmetric=False))],
)  # fmt: skip
def test_what_is_no_encoding_cannot_be_made(make):
    with pytest.raises(EncodingError):
        make()


def test_words_for_encodings():
    assert str(Affine(4, True, "group", 32)) == "int4 group 32"
    assert str(Affine(8, False, "tensor")) == "int8 per tensor asymmetric"
    assert str(Float()) == "float16"


def test_activation_grids_have_the_whole_range():
    assert (ActivationEncoding(8, 0.1, 3).low, ActivationEncoding(8, 0.1, 3).high) == (-128, 127)
    assert (ActivationEncoding(16, 0.1, 0).low, ActivationEncoding(16, 0.1, 0).high) == (-32768, 32767)
