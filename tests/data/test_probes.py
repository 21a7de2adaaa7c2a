"""Probes ask what noise does not: zeros, constants, pixels, other sizes; integers vary."""

import numpy as np
import pytest

from edgeship.core.model import Signature, TensorSpec
from edgeship.data.batches import generate_batches
from edgeship.data.probes import probe_batches
from edgeship.data.states import state_pairs

X = TensorSpec("x", "f32", (1, 3, 16, 16))
IDS = TensorSpec("ids", "i64", (1, 12), low=0, high=99)
MASK = TensorSpec("mask", "i64", (1, 12), low=0, high=1)


def test_every_kind_is_what_its_name_says():
    found = {probe.kind: probe.batch["x"] for probe in probe_batches(Signature((X,), ()))}
    assert not found["zeros"].any()
    assert len(np.unique(found["one constant"])) == 1
    assert 0 <= found["0..1"].min() < found["0..1"].max() <= 1
    assert found["0..255"].max() > 200
    assert 0 < np.abs(found["noise x 1e-3"]).max() < 0.01
    assert found["noise x 1e3"].std() == pytest.approx(1000, rel=0.1)
    assert found["large mean, small spread"].mean() == pytest.approx(100, rel=1e-3)
    assert 0.8 < (found["sparse"] == 0).mean() < 1
    assert all(value.dtype == np.float32 and value.shape == X.shape for value in found.values())


def test_an_input_without_axes_stays_an_array():
    probes = probe_batches(
        Signature((X, TensorSpec("rate", "f32", ()), TensorSpec("step", "i32", (), low=0, high=9)), ())
    )
    values = [probe.batch[name] for probe in probes for name in ("rate", "step")]
    assert all(isinstance(value, np.ndarray) and value.shape == () for value in values)


def test_a_range_keeps_probes_inside_it_and_asks_about_its_ends():
    spec = TensorSpec("x", "f32", (1, 8), low=-1.0, high=1.0)
    probes = probe_batches(Signature((spec,), ()))
    assert {probe.kind for probe in probes} >= {
        "zeros",
        "one constant",
        "0..1",
        "the lowest value",
        "the highest value",
    }
    assert all(np.abs(probe.batch["x"]).max() <= 1.001 for probe in probes)


def test_integers_alone_are_asked_in_kinds_of_their_own():
    probes = {probe.kind: probe.batch for probe in probe_batches(Signature((IDS, MASK), ()))}
    assert set(probes) == {
        "the lowest integer", "the highest integer", "integers of a narrow band", "integers that rise"
    }  # fmt: skip
    assert probes["the lowest integer"]["ids"].max() == 0
    assert probes["the highest integer"]["ids"].min() == 99
    assert np.ptp(probes["integers of a narrow band"]["ids"]) < 20
    assert (np.diff(probes["integers that rise"]["ids"]) == 1).all()
    assert all(batch["ids"].dtype == np.int64 and batch["mask"].any() for batch in probes.values())
    assert probe_batches(Signature((MASK,), ())) == []


def test_integers_vary_beside_floats():
    probes = probe_batches(Signature((X, IDS, MASK), ()))
    assert len({probe.batch["mask"].tobytes() for probe in probes}) > 3
    assert all(probe.batch["mask"].any() for probe in probes)
    assert all(probe.batch["ids"].max() > 1 for probe in probes)


@pytest.mark.parametrize("spec", [MASK, TensorSpec("m", "bool", (2, 7)), TensorSpec("m", "i32", (1, 7))])
def test_masks_are_ones_and_padded_on_either_side(spec):
    masks = [batch[spec.name].astype(bool) for batch in generate_batches(Signature((spec,), ()), 4)]
    none, behind, before, between = masks
    assert none.all()
    assert behind[..., 0].all()
    assert not behind[..., -1].any()
    assert before[..., -1].all()
    assert not before[..., 0].any()
    assert 0 < between.sum() < between.size


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("state", "stateN"), ("h", "hn"), ("h0", "hn"), ("h_in", "h_out"), ("prev_state", "next_state"),
        ("cache_input", "cache_output"), ("hidden", "new_hidden"), ("inState", "outState"), ("memory", "memory"),
    ],
)  # fmt: skip
def test_an_output_that_comes_back_is_found(given, made):
    state = TensorSpec(given, "f32", (1, 8))
    signature = Signature((X, state), (TensorSpec("y", "f32", (1, 8)), TensorSpec(made, "f32", (1, 8))))
    assert state_pairs(signature) == {made: given}


@pytest.mark.parametrize(
    ("given", "made"),
    [(("h", (1, 8)), ("hn", (1, 9))), (("x2", (1, 8)), ("y2", (1, 8))), (("h", (1, 8)), ("logits", (1, 8)))],
)
def test_what_does_not_come_back_is_not(given, made):
    signature = Signature((X, TensorSpec(given[0], "f32", given[1])), (TensorSpec(made[0], "f32", made[1]),))
    assert state_pairs(signature) == {}


def test_an_image_to_image_network_has_no_state():
    signature = Signature((TensorSpec("image_in", "f32", (1, 8)),), (TensorSpec("image_out", "f32", (1, 8)),))
    assert state_pairs(signature) == {}
