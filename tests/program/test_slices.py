"""Parts of like scale: found along whichever axis they lie, and not where chance alone makes numbers differ."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.program.slices import Slice, slices_of


@given(
    axis=st.integers(0, 2),
    split=st.integers(1, 5),
    factor=st.sampled_from([1e-6, 1e-3, 1e-2, 1e2, 1e4]),
    seed=st.integers(0, 9),
)
def test_a_part_of_another_scale_is_found_on_its_axis(axis, split, factor, seed):
    values = np.random.default_rng(seed).uniform(0.5, 1, (3, 6, 6, 6))
    small = np.moveaxis(values, axis + 1, 0)
    small[split:] *= factor
    found = slices_of(values)
    assert {part.axis for part in found} == {axis}
    assert {part.indices for part in found} == {tuple(range(split)), tuple(range(split, 6))}
    largest = [float(np.abs(part.of(values)).max()) for part in found]
    assert largest == sorted(largest, reverse=True)


def test_every_number_is_in_one_slice():
    values = np.random.default_rng(0).standard_normal((20, 9, 4)) * np.logspace(-6, 2, 9)[:, None]
    found = slices_of(values)
    assert len(found) > 4
    assert sum(part.of(values).size for part in found) == values.size


@pytest.mark.parametrize("shape", [(16, 1000), (4, 1, 1000), (4, 8, 8), (5, 1), (5,)])
def test_numbers_of_one_scale_are_one_slice(shape):
    values = np.random.default_rng(0).standard_normal(shape)
    assert slices_of(values) == [Slice()]
    assert Slice().of(values).shape == (shape[0], values.size // shape[0])


def test_zeros_are_no_slice_of_their_own():
    values = np.ones((2, 4, 3))
    values[:, 2] = 0
    assert slices_of(values) == [Slice()]
    assert slices_of(0 * values) == [Slice()]


def test_a_slice_says_where_it_lies():
    assert [str(Slice()), str(Slice(1, (4,))), str(Slice(1, (4, 5, 6))), str(Slice(0, (1, 3)))] == [
        "all", "axis 1, 4", "axis 1, 4 to 6", "axis 0, 2 of its indices",
    ]  # fmt: skip


def test_a_few_numbers_are_apart_when_their_scale_is_far_off():
    values = np.random.default_rng(0).uniform(0.3, 1, (4, 6)) * np.array([640, 640, 640, 640, 1, 1])
    assert [part.indices for part in slices_of(values)] == [(0, 1, 2, 3), (4, 5)]
    assert slices_of(values / np.array([640, 640, 640, 640, 30, 30])) == [Slice()]
