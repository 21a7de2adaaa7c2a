"""Which slice decides, against which limit."""

import numpy as np
import pytest

from edgeship.program.compare import Comparison
from edgeship.program.judging import ROOM_DB, Scales, judge


def compared(wanted, found) -> Comparison:
    comparison = Comparison()
    for want, have in zip(wanted, found, strict=True):
        comparison.add({"output": want.astype(np.float32)}, {"output": have.astype(np.float32)})
    return comparison


def scales_of(comparison) -> Scales:
    scales = Scales()
    scales.widen(comparison)
    return scales


def detector(rng, count=4):
    return [np.concatenate([640 * rng.random((1, 4, 50)), 0.1 * rng.random((1, 8, 50))], 1) for _ in range(count)]


def test_a_detector_whose_scores_are_gone_does_not_pass_by_its_boxes():
    wanted = detector(np.random.default_rng(0))
    found = [item.copy() for item in wanted]
    for item in found:
        item[:, 4:] = 0.05
    comparison = compared(wanted, found)
    assert comparison.snr_db > 70, "one number for the whole tensor sees nothing"
    worst = judge("noise", comparison, scales_of(comparison), 18.0)[0]
    assert not worst.passed
    assert worst.where == "[:, 4..11, :]"
    assert worst.distinct == 1
    assert "one constant" in worst.fault
    assert str(worst).startswith("output[:, 4..11, :] on noise: one constant")


def test_a_slice_passes_by_its_own_ratio():
    rng = np.random.default_rng(0)
    wanted = detector(rng)
    found = [item * (1 + 1e-3 * rng.standard_normal(item.shape)) for item in wanted]
    findings = judge("noise", compared(wanted, found), scales_of(compared(wanted, found)), 30.0)
    assert all(item.passed for item in findings)
    assert min(item.snr_db for item in findings) > 50


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_that_the_original_has_not_is_a_failure(bad):
    wanted = [np.ones((1, 4, 8))]
    found = [np.ones((1, 4, 8))]
    found[0][0, 1, 2] = bad
    worst = judge("zeros", compared(wanted, found), Scales(), 18.0)[0]
    assert worst.fault == "NaN or infinity"
    assert not worst.passed


def test_what_the_original_cannot_answer_is_left_out_and_counted():
    wanted = [np.ones((1, 4, 8))]
    wanted[0][0, 1, 2] = np.nan
    found = [np.ones((1, 4, 8))]
    comparison = compared(wanted, found)
    assert comparison.outputs["output"].unanswered == 1
    assert judge("zeros", comparison, Scales(), 70.0)[0].passed


def test_rounding_where_the_answer_is_zero_is_no_error():
    usual = compared([np.ones((1, 4, 16))], [np.ones((1, 4, 16))])
    zeros = compared([np.zeros((1, 4, 16))], [np.full((1, 4, 16), 1e-7)])
    assert judge("zeros", zeros, scales_of(usual), 70.0)[0].passed
    wrong = compared([np.zeros((1, 4, 16))], [np.full((1, 4, 16), 1e-2)])
    assert not judge("zeros", wrong, scales_of(usual), 18.0)[0].passed


def test_the_limit_is_not_above_what_the_original_reaches_itself():
    wanted = [np.random.default_rng(0).standard_normal((1, 4, 64))]
    moved = [wanted[0] + 0.1]
    own = compared(wanted, moved)
    worst = judge("noise x 1e3", compared(wanted, [wanted[0] - 0.1]), Scales(), 30.0, own=own)[0]
    assert worst.lowered
    assert worst.passed
    assert worst.limit_db == pytest.approx(own.snr_db - ROOM_DB, abs=0.1)


def islands(columns) -> list[np.ndarray]:
    """A map of 64 x 64 that is zero but for the given columns."""
    plane = np.zeros((1, 1, 64, 64))
    plane[..., columns] = 1
    return [plane]


def test_where_rounding_moves_all_that_an_output_says_no_slice_of_it_is_judged():
    # The original says 1 in column 20, and in column 40 once its values are rounded; the artifact in column 1.
    wanted, found = islands([20]), islands([1])
    scattered = judge("noise x 1e3", compared(wanted, found), Scales(), 12.0, own=compared(wanted, islands([40])))
    assert all(item.passed and item.lowered for item in scattered)
    # Where the original stays, a slice that rounding spares is judged as ever.
    nearly = [wanted[0] * 1.01]
    steady = judge("noise x 1e3", compared(wanted, found), Scales(), 12.0, own=compared(wanted, nearly))
    assert not steady[0].passed


def test_slices_far_below_the_whole_are_rounding_of_it():
    wanted = [
        np.concatenate([20 + rng.random((1, 4, 32)), 1e-8 * rng.random((1, 4, 32))], 1)
        for rng in [np.random.default_rng(0)]
    ]
    found = [item.copy() for item in wanted]
    found[0][:, 4:] = 0
    assert all(
        item.passed for item in judge("noise", compared(wanted, found), scales_of(compared(wanted, found)), 70.0)
    )


def test_what_is_below_the_normal_range_of_float16_is_rounding_in_float16_alone():
    usual = compared([np.ones((1, 4, 32))], [np.ones((1, 4, 32))])
    tiny = compared([np.full((1, 4, 32), 2e-5)], [np.zeros((1, 4, 32))])
    assert judge("0..1", tiny, scales_of(usual), 0.0, halves=True)[0].passed
    assert not judge(
        "0..1", compared([np.full((1, 4, 32), 2e-3)], [np.zeros((1, 4, 32))]), scales_of(usual), 1.0, halves=True
    )[0].passed
    small = scales_of(tiny)
    assert not judge("noise", tiny, small, 18.0, halves=True)[0].passed, (
        "an output that is small as a whole is no rounding"
    )


def test_shares_far_below_a_hundredth_say_no_either_way():
    wanted, found = [np.full((1, 4, 32), 1e-6)], [np.full((1, 4, 32), 2e-6)]
    comparison = compared(wanted, found)
    shares = Scales(frozenset({"output"}))
    shares.widen(comparison)
    assert judge("zeros", comparison, shares, 70.0)[0].passed
    assert not judge("zeros", comparison, scales_of(comparison), 70.0)[0].passed
    gone = compared([np.full((1, 4, 32), 0.05)], [np.zeros((1, 4, 32))])
    assert not judge("zeros", gone, shares, 18.0)[0].passed


@pytest.mark.parametrize("shape", [(1, 1), (1, 64)])
def test_what_weights_lose_is_held_against_the_usual_answer_of_one_number_too(shape):
    rng = np.random.default_rng(0)
    usual = [0.5 * rng.random(shape) for _ in range(16)]
    scales = scales_of(compared(usual, usual))
    quiet = compared([np.full(shape, 0.003)], [np.full(shape, 0.003) + 5e-4 * rng.choice([-1, 1], shape)])
    assert judge("0..1", quiet, scales, 18.0, stored=True)[0].passed
    assert not judge("0..1", quiet, scales, 18.0)[0].passed
    wrong = compared([np.full(shape, 0.3)], [np.full(shape, 0.2)])
    assert not judge("0..1", wrong, scales, 18.0, stored=True)[0].passed
