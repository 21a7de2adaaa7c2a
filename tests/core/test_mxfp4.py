"""MXFP4 against ml_dtypes' own types, which know nothing of us, and against every choice of an exponent."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeship.compression.encode import Encoder
from edgeship.core.encodings import encoding_named, fitted, short_name, stored_bits
from edgeship.core.encodings.mxfp4 import BIAS, BLOCK, DOUBLED, HIGHEST, LOWEST, NUMBERS, nearest
from edgeship.core.inventory import WeightUse
from edgeship.core.records import from_plain, to_plain
from edgeship.core.weights import MXFP4, Affine, Encoding, MXFP4Tensor, same_numbers
from edgeship.errors import EncodingError, UsageError, WeightsError


def by_ml_dtypes(tensor):
    """What a tensor's bits mean to another library: E2M1 elements times E8M0 scales."""
    elements = tensor.elements.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scales = tensor.exponents.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return elements * np.repeat(scales, BLOCK, axis=1)


@st.composite
def weights(draw):
    rows, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    trailing = draw(st.sampled_from([(), (1, 1), (3, 2)]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = random.standard_normal((rows, blocks * BLOCK, *trailing)).astype(np.float32)
    weight *= np.float32(2.0) ** draw(st.sampled_from([-20, -13, -3, 0, 5, 12]))
    if draw(st.booleans()):
        weight[0, :BLOCK] = 0
    return weight


@given(weights(), st.booleans())
def test_the_bits_mean_what_another_library_reads_in_them(weight, clip):
    tensor = MXFP4().encode(weight, clip=clip)
    assert np.array_equal(tensor.dequantize(), by_ml_dtypes(tensor))
    assert tensor.fits_float16
    assert np.array_equal(tensor.dequantize(), tensor.dequantize().astype(np.float16).astype(np.float32))
    assert not (tensor.elements == 8).any()
    assert same_numbers(tensor, MXFP4().rebuild(tensor.arrays())) == ""


@given(st.integers(0, 2**32 - 1))
def test_elements_are_rounded_as_another_library_does(seed):
    values = np.random.default_rng(seed).standard_normal(256).astype(np.float32) * 4
    values[:28] = np.arange(-7, 7, 0.5)
    values[28:42] = [x for middle in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5) for x in (middle, -middle)]
    wanted = values.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(np.array(NUMBERS, np.float32)[nearest(values)], wanted)


@given(weights())
def test_the_exponent_is_the_specifications(weight):
    """6.3: the largest power of two of the block's largest number, less that of the largest element."""
    tensor = MXFP4().encode(weight)
    blocks = np.abs(weight).reshape(weight.shape[0], -1, BLOCK, *weight.shape[2:]).max(axis=2)
    wanted = np.floor(np.log2(np.where(blocks > 0, blocks, 4.0))) - 2
    assert np.array_equal(tensor.exponents.astype(int) - BIAS, np.clip(wanted, LOWEST, HIGHEST))


@given(weights())
def test_clipping_is_never_worse(weight):
    def error(clip):
        return np.square(MXFP4().encode(weight, clip=clip).dequantize() - weight, dtype=np.float64).sum()

    assert error(True) <= error(False) * (1 + 1e-6)


def test_every_number_in_the_list_is_twice_an_element():
    codes = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(np.array(DOUBLED), 2 * codes)


def test_name_sizes_and_record():
    use = WeightUse("w", "linear", (8, 64))
    assert encoding_named("mxfp4") == MXFP4()
    assert short_name(MXFP4()) == str(MXFP4()) == "mxfp4"
    assert stored_bits(MXFP4(), use, 4, scale_bits=8) == 8 * 64 * 4 + 16 * 8
    assert MXFP4().encode(np.ones((8, 64), np.float32)).stored_bytes == 8 * 64 // 2 + 16
    assert from_plain(Encoding, to_plain(MXFP4())) == MXFP4()
    with pytest.raises(UsageError, match="no family of encodings is called 'mxfp5'"):
        from_plain(Encoding, {"kind": "mxfp5"})


def test_what_blocks_do_not_divide_gets_int8():
    assert fitted(MXFP4(), WeightUse("w", "linear", (8, 64))) == MXFP4()
    assert fitted(MXFP4(), WeightUse("w", "linear", (8, 75))) == Affine(8)
    assert fitted(MXFP4(), WeightUse("w", "conv", (8, 64, 3, 3))) == Affine(8)


@pytest.mark.parametrize(
    ("weight", "error", "says"),
    [
        (np.full((2, 32), np.nan, np.float32), WeightsError, "NaN or infinity"),
        (np.full((2, 32), 6e4, np.float32), WeightsError, "too large"),
        (np.zeros((2, 33), np.float32), EncodingError, "blocks of 32 do not divide"),
        (np.zeros(32, np.float32), EncodingError, "blocks of 32 do not divide"),
    ],
)
def test_what_cannot_be_rounded_is_named(weight, error, says):
    with pytest.raises(error, match=says):
        MXFP4().encode(weight, name="layer")


@pytest.mark.parametrize(
    ("exponents", "says"),
    [(np.full((2, 2), BIAS, np.uint8), "do not serve"), (np.full((2, 1), 255, np.uint8), "not a number")],
)
def test_a_tensor_of_wrong_scales_is_refused(exponents, says):
    with pytest.raises(EncodingError, match=says):
        MXFP4Tensor(np.zeros((2, 32), np.uint8), exponents)


def test_a_scale_that_float16_lacks_is_seen():
    assert not MXFP4Tensor(np.zeros((1, 32), np.uint8), np.array([[BIAS + 20]], np.uint8)).fits_float16


def test_rows_that_come_in_parts_are_the_same_weight(monkeypatch):
    from edgeship.compression import encode
    from edgeship.core.model import TensorSpec
    from edgeship.program.export import make_program

    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 24)
    program = make_program(layer, [TensorSpec("x", "f32", (1, 64))], [torch.zeros(1, 64)])
    whole, _ = Encoder(program, {"weight": MXFP4()}, "clipped").encode()
    monkeypatch.setattr(encode, "CHUNK_ELEMENTS", 256)
    parts, _ = Encoder(program, {"weight": MXFP4()}, "clipped").encode()
    assert same_numbers(whole["weight"], parts["weight"]) == ""
