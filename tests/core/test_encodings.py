"""Short names of encodings, and how they fit a weight."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.core.encodings import encoding_named, fitted, short_name, stored_bits
from edgeship.core.inventory import WeightUse
from edgeship.core.weights import Affine, Float, Palette, Sparse
from edgeship.errors import UsageError

affine = st.builds(
    lambda bits, symmetric, reach: Affine(bits, symmetric, *reach),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
    st.sampled_from([("channel", None), ("tensor", None), ("group", 16), ("group", 128)]),
)
palette = st.builds(Palette, st.sampled_from([1, 2, 3, 4, 6, 8]), st.sampled_from([None, 1, 8, 16]))
plain = st.one_of(st.sampled_from([Float(16), Float(32)]), affine, palette)


@given(st.one_of(plain, plain.map(Sparse)))
def test_every_encoding_has_a_name_that_reads_back(encoding):
    assert encoding_named(short_name(encoding)) == encoding


def test_the_names_are_those_of_the_documentation():
    assert encoding_named("int4-g32-asym") == Affine(4, False, "group", 32)
    assert encoding_named("int8") == Affine(8)
    assert encoding_named("palette4-c8") == Palette(4, 8)
    assert encoding_named("sparse-int8-tensor") == Sparse(Affine(8, True, "tensor"))


@pytest.mark.parametrize(
    "text", ["int5", "int8-tensor-g32", "float8", "palette5", "int4-c8", "", "sparse-", "8", "int-4"]
)
def test_what_is_no_encoding_is_refused_with_examples(text):
    with pytest.raises(UsageError, match="is no encoding") as error:
        encoding_named(text)
    assert "int4-g32" in error.value.fix


def test_groups_fall_back_to_channels_where_they_do_not_divide():
    group = Affine(4, True, "group", 32)
    assert fitted(group, WeightUse("w", "linear", (8, 64))) == group
    assert fitted(group, WeightUse("w", "linear", (8, 200))) == Affine(4)
    assert fitted(group, WeightUse("w", "conv", (8, 64, 3, 3))) == Affine(4)


def test_palettes_fall_back_to_the_tensor_where_channels_do_not_divide():
    assert fitted(Palette(4, 8), WeightUse("w", "linear", (16, 4))) == Palette(4, 8)
    assert fitted(Palette(4, 8), WeightUse("w", "linear", (12, 4))) == Palette(4)
    assert fitted(Palette(4, 8), WeightUse("w", "conv_transpose", (16, 8, 2, 2), channel_axis=1)) == Palette(4)


def test_bytes_count_scales_tables_zero_points_and_masks():
    use = WeightUse("w", "linear", (8, 64))
    assert stored_bits(Affine(4), use, 4) == 512 * 4 + 8 * 16
    assert stored_bits(Affine(4, False, "group", 32), use, 4) == 512 * 4 + 16 * (16 + 4)
    assert stored_bits(Affine(4), use, 4, scale_bits=32) == 512 * 4 + 8 * 32
    assert stored_bits(Palette(4, 2), use, 4) == 512 * 4 + 4 * 16 * 16
    assert stored_bits(Sparse(Affine(8)), use, 8, sparsity=0.75) == 512 + 128 * 8 + 8 * 16
