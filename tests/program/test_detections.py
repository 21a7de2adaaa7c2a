"""Rows that programs choose are compared as sets: near ties may change places, nothing may be lost or invented."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeship.program.chosen import RowSet
from edgeship.program.detections import Columns, Compared, compare_rows

Array = np.ndarray[Any, Any]
SET = RowSet({"boxes": 0, "scores": 0, "labels": 0}, "count")
SHARE = 0.03
ROWS = 12


def answer_of(seed: int, count: int = 8, rows: int = ROWS) -> dict[str, Array]:
    """Boxes of an image of 320, scores that fall, classes; zeros behind ``count``."""
    generator = np.random.default_rng(seed)
    made: dict[str, Array] = {
        "boxes": generator.random((rows, 4)).astype(np.float32) * 320,
        "scores": np.linspace(0.9, 0.3, rows, dtype=np.float32),
        "labels": generator.integers(0, 80, rows),
    }
    for value in made.values():
        value[count:] = 0
    made["count"] = np.array([count])
    return made


def compared(wanted: dict[str, Array], found: dict[str, Array], *others: dict[str, Array]) -> Compared:
    """``found`` beside ``wanted``, by columns as a few other answers have them."""
    columns = Columns()
    for seed in range(90, 94):
        columns.widen(SET, answer_of(seed))
    return compare_rows(SET, columns, wanted, found, SHARE, lambda: others)


def ordered(answer: dict[str, Array], places: Any) -> dict[str, Array]:
    """An answer with its rows in another order, or other rows left out (-1: zeros)."""
    made = {name: value.copy() for name, value in answer.items()}
    for name in SET.axes:
        for row, place in enumerate(places):
            made[name][row] = answer[name][place] if place >= 0 else 0
    return made


def counts(found: Compared) -> tuple[int, int, int, int, int, int]:
    """The tally as a row."""
    tally = found.tally
    return tally.wanted, tally.agreed, tally.lost, tally.invented, tally.moved, tally.close


def test_near_ties_may_change_places() -> None:
    wanted = answer_of(0)
    wanted["scores"][3:5] = 0.7000, 0.6999
    swapped = ordered(wanted, [0, 1, 2, 4, 3, 5, 6, 7, *[-1] * 4])
    found = compared(wanted, swapped)
    assert counts(found) == (8, 8, 0, 0, 0, 0)
    for name in SET.axes:
        np.testing.assert_array_equal(found.answer[name], wanted[name])


def test_rows_far_apart_may_not_change_places() -> None:
    wanted = answer_of(0)
    found = compared(wanted, ordered(wanted, [7, *range(1, 7), 0, *[-1] * 4]))
    assert found.tally.moved > 0
    assert found.tally.agreed == 8 - found.tally.moved
    assert (found.tally.lost, found.tally.invented) == (0, 0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, ROWS), st.data())
def test_a_dropped_box(seed: int, count: int, data: st.DataObject) -> None:
    wanted = answer_of(seed, count)
    gone = data.draw(st.integers(0, count - 1))
    left = [place for place in range(count) if place != gone]
    found = ordered(wanted, [*left, *[-1] * (ROWS - count + 1)])
    found["count"] = np.array([count - 1])
    assert counts(compared(wanted, found)) == (count, count - 1, 1, 0, 0, 0)
    assert counts(compared(found, wanted)) == (count - 1, count - 1, 0, 1, 0, 0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 7), st.integers(0, 3), st.sampled_from([-40.0, 40.0]))
def test_a_shifted_box(seed: int, row: int, side: int, step: float) -> None:
    wanted = answer_of(seed)
    found = ordered(wanted, range(ROWS))
    found["boxes"][row, side] += step
    assert counts(compared(wanted, found)) == (8, 7, 1, 1, 0, 0)
    # A little further is the same box, and its numbers are judged where they stand.
    found["boxes"][row, side] += 1.0 - step
    near = compared(wanted, found)
    assert counts(near) == (8, 8, 0, 0, 0, 0)
    assert near.answer["boxes"][row, side] == found["boxes"][row, side]


def test_another_class_is_another_row() -> None:
    wanted = answer_of(0)
    found = ordered(wanted, range(ROWS))
    found["labels"][2] += 1
    assert counts(compared(wanted, found)) == (8, 7, 1, 1, 0, 0)


def test_what_the_program_itself_does_by_a_hair_is_left_out() -> None:
    wanted = answer_of(0)
    less = ordered(wanted, [*range(7), *[-1] * 5])
    less["count"] = np.array([7])
    assert counts(compared(wanted, less, wanted, less)) == (7, 7, 0, 0, 0, 1)
    assert counts(compared(less, wanted, less, wanted)) == (7, 7, 0, 0, 0, 0)
    # The place of a row that goes by a hair is taken by one or another.
    first, second = ordered(wanted, range(ROWS)), ordered(wanted, range(ROWS))
    first["labels"][7], second["labels"][7] = wanted["labels"][7] + 1, wanted["labels"][7] + 2
    assert counts(compared(wanted, second, wanted, first)) == (7, 7, 0, 0, 0, 1)
    assert counts(compared(wanted, second, wanted, wanted)) == (8, 7, 1, 1, 0, 0)
    # One that is there twice is one too many, though the moved program has it once.
    twice = ordered(wanted, [0, *range(7), *[-1] * 4])
    assert counts(compared(wanted, twice, wanted))[2:4] == (1, 1)
    # One that stays whatever is moved must stay.
    assert counts(compared(wanted, ordered(less, [*range(1, 8), *[-1] * 4]), wanted, less))[2] == 1


def test_rows_behind_those_that_count_hold_zeros() -> None:
    wanted = answer_of(0)
    found = ordered(wanted, range(ROWS))
    found["scores"][9] = 0.5
    assert counts(compared(wanted, found)) == (8, 8, 0, 1, 0, 0)
    found["count"] = np.array([-3])
    assert compared(wanted, found).tally.lost == 8


def test_what_is_not_finite_stays_where_it_is() -> None:
    wanted = answer_of(0)
    found = ordered(wanted, range(ROWS))
    found["scores"][0] = np.nan
    assert np.isnan(compared(wanted, found).answer["scores"][0])


def test_batches_and_rows_on_a_later_axis() -> None:
    rows = RowSet({"kept": 1})
    wanted = {"kept": np.random.default_rng(0).random((2, 5, 6)).astype(np.float32)}
    # One tie in the second image alone.
    wanted["kept"][1, :, 4] = 0.9, 0.8, 0.8, 0.7, 0.6
    wanted["kept"][0, :, 4] = 0.9, 0.85, 0.8, 0.7, 0.6
    columns = Columns()
    columns.widen(rows, wanted)
    found = {"kept": wanted["kept"].copy()}
    found["kept"][1, 1:3] = wanted["kept"][1, [2, 1]]
    same = compare_rows(rows, columns, wanted, found, SHARE)
    assert (same.tally.agreed, same.tally.wanted) == (10, 10)
    np.testing.assert_array_equal(same.answer["kept"], wanted["kept"])
    found["kept"][0, :] = wanted["kept"][0, [4, 1, 2, 3, 0]]
    assert compare_rows(rows, columns, wanted, found, SHARE).tally.moved > 0


def test_no_rows_at_all() -> None:
    wanted = answer_of(0, 0)
    assert counts(compared(wanted, answer_of(1, 0))) == (0, 0, 0, 0, 0, 0)
    assert compared(wanted, answer_of(1, 2)).tally.invented == 2
