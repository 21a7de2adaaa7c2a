"""Gates that fall short: which layers get bits back, and that the build then holds or ends with the ranking."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from edgeship.core.inventory import Inventory, WeightUse
from edgeship.core.model import Source
from edgeship.core.profile import Request
from edgeship.core.registry import profiles, targets
from edgeship.core.weights import Affine, Float, Palette, Sparse
from edgeship.engine.repair import larger_encoding, raise_worst

LINEAR = WeightUse("a", "linear", (16, 64))
INVENTORY = Inventory((LINEAR, WeightUse("b", "linear", (16, 64)), WeightUse("c", "conv", (16, 4, 3, 3))), (), 1)


def request(runtime="onnx", profile="balanced"):
    source = Source(Path("m.py"), (), reference="m.py:f")  # type: ignore[arg-type]
    target = targets()["galaxy-s24" if runtime == "qnn" else "iphone15pro"]
    return Request(source, target, runtime, profiles()[profile], INVENTORY)


@pytest.mark.parametrize(
    ("runtime", "encoding", "larger"),
    [
        ("onnx", Affine(2), Affine(4)),  # three bits take four in the file: nothing is gained by them
        ("onnx", Affine(4, False, "group", 32), Affine(8)),
        ("onnx", Affine(8), Float(16)),
        ("onnx", Float(16), None),
        ("coreml", Palette(2, 8), Palette(3, 8)),
        ("coreml", Palette(6, 8), Affine(8)),
        ("coreml", Sparse(Palette(4, 8)), Palette(6, 8)),
    ],
)
def test_the_next_larger_encoding_is_one_that_the_runtime_holds(runtime, encoding, larger):
    assert larger_encoding(request(runtime), LINEAR, encoding) == larger


def test_hexagon_has_nothing_above_eight_bits_with_integer_activations():
    assert larger_encoding(request("qnn"), LINEAR, Affine(4)) == Affine(8)
    assert larger_encoding(request("qnn"), LINEAR, Affine(8)) is None


def test_the_worst_are_raised_until_half_of_the_loss_is_gone():
    encodings = {name: Affine(4) for name in "abc"}
    assert raise_worst(request(), {"a": 0.1, "b": 0.5, "c": 0.3}, encodings) == {"b": "int8"}
    assert raise_worst(request(), {"a": 0.3, "b": 0.3, "c": 0.3}, encodings) == {"a": "int8", "b": "int8"}
    kept = dataclasses.replace(request(), raised=(("a", "float16"),))
    assert raise_worst(kept, {"b": 0.5}, encodings) == {"a": "float16", "b": "int8"}


def test_it_ends_when_nothing_is_left_or_rounding_is_not_the_cause():
    assert raise_worst(request(), {"a": 0.5}, {"a": Float(16)}) is None
    assert raise_worst(request(), {"a": 1e-7, "b": 1e-8}, {"a": Affine(4), "b": Affine(4)}) is None


def build(cli, root, output, *options):
    return cli(
        "build",
        root / "samples" / "digits_cnn",
        "--target",
        "iphone15pro",
        "--runtime",
        "onnx",
        "-o",
        output,
        "--json",
        *options,
    )


def test_two_bits_are_raised_until_the_gate_holds(cli, root, tmp_path):
    ran = build(
        cli,
        root,
        tmp_path / "b",
        "--set",
        "compress/quantize.bits=2",
        "--set",
        "compress/quantize.method=nearest",
        "--max-drop",
        "1%",
    )
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert any("the accuracy gate gave" in note for note in report["notes"])
    assert "int4" in report["rows"][0]["weights"] or "int8" in report["rows"][0]["weights"]
    inspected = json.loads(cli("inspect", tmp_path / "b", "--json").out)
    losses = [layer["loss"] for layer in inspected["artifacts"][0]["layers"].values()]
    assert all(loss is not None for loss in losses)


@pytest.mark.heavy
def test_a_gate_that_bits_cannot_meet_fails_with_the_ranking(cli, root, tmp_path):
    ran = build(cli, root, tmp_path / "b", "--set", "compress/prune.sparsity=0.95", "--max-drop", "0.1%")
    assert ran.code == 1
    assert "check/accuracy fell short on onnx" in ran.errors[0]
    notes = json.loads(ran.out)["notes"]
    assert any("layers by what they cost" in note for note in notes)
    assert any("stored densely: the file gains nothing" in note for note in notes)
    # Losses of layers are taken against the pruned model: what pruning took is said beside them.
    (pruning,) = [note for note in notes if "pruning came first" in note]
    assert "95%" in pruning
    assert float(re.search(r"noise over signal at the outputs (\S+);", pruning)[1]) > 0.01
    assert not (tmp_path / "b").exists()


def test_auto_meets_the_bytes_it_was_given(cli, root, tmp_path):
    ran = build(cli, root, tmp_path / "b", "--profile", "auto", "--max-size", "40KB")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert report["rows"][0]["size_bytes"] <= 40_000
    assert any("best choices" in note for note in report["notes"])
    assert (tmp_path / "b" / "trade-off-onnx.svg").is_file()
    record = json.loads((tmp_path / "b" / "manifest.json").read_text())["artifacts"][0]
    assert record["weight_bytes"] < report["rows"][0]["size_bytes"]
    assert sum(layer["bytes"] for layer in record["encodings"].values()) < record["weight_bytes"]


def test_a_budget_that_nothing_fits_is_refused_before_anything_is_converted(cli, root, tmp_path):
    ran = build(cli, root, tmp_path / "b", "--profile", "auto", "--max-size", "9KB")
    assert ran.code == 1
    assert re.search(r"no choice of encodings fits onnx into 9 kB; --max-size \S+ would fit", ran.errors[0])
