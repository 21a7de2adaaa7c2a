"""Suppression of fixed size beside a plain greedy loop in numpy, which rounds as torchvision's float32 kernel does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeship.errors import UsageError
from edgeship.program.suppression import (
    BLOCK,
    CANDIDATES,
    MOST_CANDIDATES,
    check_candidates,
    first_true,
    looked_at,
    rounded_down,
    suppress,
)

QUICK = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def greedy(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """Places of the boxes that are kept, best first."""
    left, top, right, bottom = boxes.T
    area = (right - left) * (bottom - top)
    kept: list[int] = []
    for place in np.argsort(-scores, kind="stable").tolist():
        width = np.maximum(np.float32(0), np.minimum(right[place], right[kept]) - np.maximum(left[place], left[kept]))
        height = np.maximum(np.float32(0), np.minimum(bottom[place], bottom[kept]) - np.maximum(top[place], top[kept]))
        shared = width * height
        with np.errstate(all="ignore"):
            share = shared / (area[kept] + area[place] - shared)
        # The kernel compares the float32 with the threshold in double precision.
        if not bool(np.any(share.astype(np.float64) > threshold)):
            kept.append(place)
    return kept


def kept_by(boxes: np.ndarray, scores: np.ndarray, threshold: float, **options: object) -> list[int]:
    """The same by the program."""
    found = suppress(torch.from_numpy(boxes), torch.from_numpy(scores), threshold, **options)  # type: ignore[arg-type]
    count = int(found.valid.sum())
    assert found.valid[:count].all()
    return found.index[:count].tolist()


THRESHOLDS = st.sampled_from([0.0, 0.1, 0.3, 1 / 3, 0.5, 0.7, 0.9, 1.0])


@QUICK
@given(st.integers(0, 10_000), st.integers(1, 96), st.integers(1, 40), THRESHOLDS)
def test_what_is_kept(seed: int, count: int, levels: int, threshold: float) -> None:
    generator = np.random.default_rng(seed)
    # Whole numbers in a small square: equal boxes, equal scores, shares at the threshold itself, sides of 0.
    corner = generator.integers(0, 12, (count, 2))
    side = generator.integers(0, 7, (count, 2))
    boxes = np.concatenate([corner, corner + side], 1).astype(np.float32)
    scores = (generator.integers(0, levels, count) / levels).astype(np.float32)
    assert kept_by(boxes, scores, threshold) == greedy(boxes, scores, threshold)


@QUICK
@given(st.integers(0, 10_000), st.integers(1, 80), THRESHOLDS)
def test_corners_the_wrong_way_round(seed: int, count: int, threshold: float) -> None:
    generator = np.random.default_rng(seed)
    boxes = generator.normal(0, 3, (count, 4)).astype(np.float32)
    scores = generator.normal(0, 1, count).astype(np.float32)
    assert kept_by(boxes, scores, threshold) == greedy(boxes, scores, threshold)


@pytest.mark.parametrize("count", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK])
def test_a_chain(count: int) -> None:
    """Each box overlaps the next alone: every second is kept, and the last hangs on the first."""
    start = np.arange(count, dtype=np.float32) * 6
    boxes = np.stack([start, np.zeros(count), start + 10, np.full(count, 10.0)], 1).astype(np.float32)
    scores = np.linspace(1, 0.1, count, dtype=np.float32)
    assert kept_by(boxes, scores, 0.2) == list(range(0, count, 2))


def test_all_but_one_are_suppressed() -> None:
    boxes = np.tile(np.array([[1, 2, 8, 9]], np.float32), (100, 1))
    scores = np.linspace(0, 1, 100, dtype=np.float32)
    assert kept_by(boxes, scores, 0.5) == [99]
    assert kept_by(boxes, np.full(100, 0.5, np.float32), 0.5) == [0]


@QUICK
@given(st.integers(0, 10_000), st.integers(2, 90), st.integers(1, 5), THRESHOLDS)
def test_classes_and_rows_that_do_not_count(seed: int, count: int, classes: int, threshold: float) -> None:
    generator = np.random.default_rng(seed)
    corner = generator.integers(0, 10, (count, 2))
    boxes = np.concatenate([corner, corner + generator.integers(0, 8, (count, 2))], 1).astype(np.float32)
    scores = (generator.integers(0, 9, count) / 9).astype(np.float32)
    kind = generator.integers(0, classes, count)
    valid = generator.random(count) < 0.7
    wanted: list[int] = []
    for number in range(classes):
        own = np.flatnonzero((kind == number) & valid)
        wanted += own[greedy(boxes[own], scores[own], threshold)].tolist()
    wanted.sort(key=lambda place: (-scores[place], place))
    found = kept_by(boxes, scores, threshold, classes=torch.from_numpy(kind), valid=torch.from_numpy(valid))
    assert found == wanted


@QUICK
@given(st.integers(0, 10_000), st.integers(1, 80), st.integers(1, 80))
def test_fewer_candidates_keep_the_first(seed: int, count: int, candidates: int) -> None:
    generator = np.random.default_rng(seed)
    corner = generator.integers(0, 30, (count, 2))
    boxes = np.concatenate([corner, corner + generator.integers(1, 9, (count, 2))], 1).astype(np.float32)
    scores = generator.random(count).astype(np.float32)
    looked = set(np.argsort(-scores, kind="stable")[:candidates].tolist())
    wanted = [place for place in greedy(boxes, scores, 0.4) if place in looked]
    assert kept_by(boxes, scores, 0.4, candidates=candidates) == wanted


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.45, 0.7, 1 / 3, 0.5, 0.0, 1.0])
def test_a_threshold_between_two_floats(threshold: float) -> None:
    """A float32 is above the threshold just when it is above the float32 that stands for it."""
    near = np.float32(threshold)
    for step in range(-3, 4):
        value = near
        for _ in range(abs(step)):
            value = np.nextafter(value, np.float32(2 if step > 0 else -2))
        assert (float(value) > threshold) == bool(value > np.float32(rounded_down(threshold)))


def test_first_true() -> None:
    place, found = first_true(torch.tensor([0.0, 1, 0, 1, 1]))
    assert place.tolist()[:3] == [1, 3, 4]
    assert found.tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("count", [0, -1, MOST_CANDIDATES + 1])
def test_numbers_of_candidates_that_nothing_can_have(count: int) -> None:
    with pytest.raises(UsageError, match="candidates"):
        check_candidates(count)
    assert check_candidates(CANDIDATES) == CANDIDATES


def test_what_the_report_says() -> None:
    assert looked_at([10, 600], 512) == [
        "a suppression looks at the best 512 of 600 boxes; --set load/PASS.candidates=N changes that"
    ]
