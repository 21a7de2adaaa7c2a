"""Slices of like size are judged together, and those of another size by themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeship.program.slice_sums import LIKE, SliceSums, groups


def sums_of(wanted, found, axis):
    sums = SliceSums(wanted.shape[axis])
    sums.add(axis, wanted.astype(np.float64), found.astype(np.float64) - wanted, found)
    return sums


def detector(rng):
    boxes, scores = 640 * rng.random((1, 4, 50)), 0.1 * rng.random((1, 8, 50))
    return np.concatenate([boxes, scores], 1)


def test_scores_beside_boxes_are_a_group_of_their_own():
    wanted = detector(np.random.default_rng(0))
    found = wanted.copy()
    found[:, 4:] = 0
    boxes, scores = groups(sums_of(wanted, found, 1), 1)
    assert boxes.where(wanted.shape) == "[:, 0..3, :]"
    assert scores.where(wanted.shape) == "[:, 4..11, :]"
    assert boxes.noise == 0
    assert scores.noise == pytest.approx(scores.signal)
    assert scores.constant
    assert not boxes.constant


def test_all_slices_of_one_size_are_the_whole_output():
    wanted = np.random.default_rng(0).standard_normal((1, 6, 40))
    (one,) = groups(sums_of(wanted, wanted, 1), 1)
    assert one.where(wanted.shape) == ""


def test_long_lists_of_slices_are_cut():
    wanted = np.ones((1, 20, 64))
    wanted[:, ::2] = 1000
    _, small = groups(sums_of(wanted, wanted, 1), 1)
    assert small.where(wanted.shape) == "[:, 1 3 5 and 7 more, :]"


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 12), st.integers(16, 40), st.lists(st.floats(1e-6, 1e6), min_size=12, max_size=12), st.integers(0, 9)
)
def test_groups_share_everything_out_and_hold_what_is_alike(channels, length, sizes, seed):
    rng = np.random.default_rng(seed)
    wanted = rng.standard_normal((1, channels, length)) * np.array(sizes[:channels])[:, None]
    found = wanted + rng.standard_normal(wanted.shape)
    sums = sums_of(wanted, found, 1)
    parts = list(groups(sums, 1))
    assert sorted(place for part in parts for place in part.places) == list(range(channels))
    assert sum(part.signal for part in parts) == pytest.approx((wanted**2).sum())
    assert sum(part.noise for part in parts) == pytest.approx(((found - wanted) ** 2).sum())
    for part in parts:
        inside = sums.sizes[list(part.places)]
        assert inside.max() / inside.min() <= LIKE * (1 + 1e-9)


def test_a_handful_of_numbers_is_no_group():
    wanted = np.array([[100.0, 100.0, 100.0, 0.1]])
    (one,) = groups(sums_of(wanted, wanted, 1), 1)
    assert one.elements == 4


def test_a_large_output_in_parts_sums_to_the_same(monkeypatch):
    from edgeship.program import compare

    rng = np.random.default_rng(0)
    wanted = rng.standard_normal((1, 7, 33)).astype(np.float32)
    found = (wanted + 0.1 * rng.standard_normal(wanted.shape)).astype(np.float32)
    whole, parts = compare.OutputError(), compare.OutputError()
    whole.add(wanted, found)
    monkeypatch.setattr(compare, "PART_ELEMENTS", 50)
    parts.add(wanted, found)
    assert parts.snr_db == pytest.approx(whole.snr_db)
    assert parts.elements == whole.elements
    for axis in (1, 2):
        assert parts.axes[axis].elements == whole.axes[axis].elements
        assert np.allclose(parts.axes[axis].signal, whole.axes[axis].signal)
        assert np.allclose(parts.axes[axis].noise, whole.axes[axis].noise)
        assert np.array_equal(parts.axes[axis].found_high, whole.axes[axis].found_high)
