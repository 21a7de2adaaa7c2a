"""Files whose results have as many rows as the values say: suppression, places that are not 0, conditions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx_files import floats, ints, run_module, run_onnxruntime, save_model

from edgeship.errors import SourceError, UnsupportedOpError, UsageError
from edgeship.frontends.onnx.importer import ImportedOnnx, import_onnx

QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def some_boxes(generator: np.random.Generator, images: int, count: int, *, centred: bool) -> np.ndarray:
    """Whole numbers, so that many overlap alike; some without area, some with their corners the wrong way round."""
    first = generator.integers(0, 12, (images, count, 2))
    second = generator.integers(0, 8, (images, count, 2)) if centred else generator.integers(0, 16, (images, count, 2))
    return np.concatenate([first, second], 2).astype(np.float32)


def compared(path: Path, feeds: dict[str, np.ndarray], *, candidates: int = 512, sort: bool = False) -> ImportedOnnx:
    """Import, run, and compare the rows that count with what ONNX Runtime answers; behind them there are zeros."""
    imported = import_onnx(path, candidates=candidates)
    names = [info.name for info in imported.outputs]
    found = dict(zip(names, run_module(imported, feeds), strict=True))
    wanted = run_onnxruntime(path, feeds)
    for name, want in zip(names, wanted, strict=False):
        have = found[name]
        assert have.dtype == want.dtype
        count = int(found.get("count", found.get(f"{name}_count", np.array([len(want)])))[0])
        assert count == len(want)
        np.testing.assert_array_equal(have[:count], want)
        assert not have[count:].any()
    return imported


@QUICK
@given(data=st.data())
def test_suppression_is_onnxruntimes(tmp_path: Path, data: st.DataObject) -> None:
    images, classes = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4))
    count = data.draw(st.integers(1, 40))
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    centred = data.draw(st.booleans())
    boxes = some_boxes(generator, images, count, centred=centred)
    scores = (generator.integers(0, 6, (images, classes, count)) / 6).astype(np.float32)
    weights = {
        "most": ints(data.draw(st.sampled_from([1, 3, 100]))),
        "overlap": np.array([data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))], np.float32),
        "least": np.array([data.draw(st.sampled_from([-1.0, 0.0, 0.3, 2.0]))], np.float32),
    }
    given_inputs = ["boxes", "scores", "most", "overlap", "least"][: data.draw(st.integers(3, 5))]
    node = helper.make_node("NonMaxSuppression", given_inputs, ["picked"], center_point_box=int(centred))
    feeds = {"boxes": boxes, "scores": scores}
    path = save_model(tmp_path / "m.onnx", [node], feeds, ["picked"], {k: weights[k] for k in given_inputs[2:]})
    imported = compared(path, feeds)
    assert imported.outputs[0].shape == (images * classes * count, 3)


def test_more_boxes_than_are_looked_at(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    feeds = {
        "boxes": generator.random((1, 60, 4), np.float32) * 100,
        "scores": generator.random((1, 2, 60), np.float32),
    }
    node = helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "overlap"], ["picked"])
    weights = {"most": ints(50), "overlap": np.array([0.9], np.float32)}
    path = save_model(tmp_path / "m.onnx", [node], feeds, ["picked"], weights)
    imported = import_onnx(path, candidates=20)
    assert "the best 20 of 120 boxes" in imported.remarks[0]
    picked, count = run_module(imported, feeds)
    wanted = run_onnxruntime(path, feeds)[0]
    # Those that are kept are the best ones that ONNX Runtime keeps.
    ranked = sorted(wanted.tolist(), key=lambda row: -feeds["scores"][0, row[1], row[2]])
    assert sorted(picked[: int(count[0])].tolist()) == sorted(ranked[: int(count[0])])
    assert 10 < int(count[0]) <= 20


def chain(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """What exporters write behind a suppression: the chosen boxes and scores, gathered by their places."""
    generator = np.random.default_rng(3)
    feeds = {
        "boxes": generator.random((1, 30, 4), np.float32) * 20,
        "scores": generator.random((1, 3, 30), np.float32),
    }
    make = helper.make_node
    nodes = [
        make("NonMaxSuppression", ["boxes", "scores", "most", "overlap", "least"], ["picked"], name="nms"),
        make("Gather", ["picked", "two"], ["place"], axis=1),
        make("Gather", ["picked", "one"], ["kind"], axis=1),
        make("Squeeze", ["boxes", "zero"], ["flat"]),
        make("Gather", ["flat", "place"], ["chosen"], axis=0),
        make("GatherND", ["scores", "picked"], ["score"]),
        make("Unsqueeze", ["score", "one_axis"], ["score_column"]),
        make("Concat", ["chosen", "score_column"], ["detections"], axis=1),
    ]
    weights = {
        "most": ints(5), "overlap": np.array([0.4], np.float32), "least": np.array([0.2], np.float32),
        "one": np.array(1, np.int64), "two": np.array(2, np.int64), "zero": ints(0), "one_axis": ints(1),
    }  # fmt: skip
    return save_model(tmp_path / "m.onnx", nodes, feeds, ["detections", "kind"], weights), feeds


def test_what_follows_a_suppression(tmp_path: Path) -> None:
    path, feeds = chain(tmp_path)
    imported = compared(path, feeds)
    assert [info.name for info in imported.outputs] == ["detections", "kind", "count"]
    assert imported.outputs[0].shape == (90, 5)


@QUICK
@given(seed=st.integers(0, 1000), rank=st.integers(1, 3))
def test_places_that_are_not_zero(tmp_path: Path, seed: int, rank: int) -> None:
    shape = (7, 3, 2)[:rank]
    x = floats(*shape, seed=seed)
    nodes = [
        helper.make_node("Greater", ["x", "limit"], ["large"]),
        helper.make_node("NonZero", ["large"], ["places"]),
        helper.make_node("Transpose", ["places"], ["rows"], perm=[1, 0]),
        helper.make_node("GatherND", ["x", "rows"], ["values"]),
    ]
    path = save_model(tmp_path / "m.onnx", nodes, {"x": x}, ["rows", "values"], {"limit": np.array(0.3, np.float32)})
    compared(path, {"x": x})


def test_a_condition_that_only_a_run_tells(tmp_path: Path) -> None:
    x = floats(9, 4)
    nodes = [
        helper.make_node("ReduceMax", ["x", "one"], ["best"], keepdims=0),
        helper.make_node("Greater", ["best", "limit"], ["large"]),
        helper.make_node("Compress", ["x", "large"], ["rows"], axis=0),
    ]
    path = save_model(
        tmp_path / "m.onnx", nodes, {"x": x}, ["rows"], {"limit": np.array(0.8, np.float32), "one": ints(1)}
    )
    compared(path, {"x": x})


@QUICK
@given(seed=st.integers(0, 1000), least=st.sampled_from([0.2, 0.6, 2.0]))
def test_suppression_of_what_values_chose(tmp_path: Path, seed: int, least: float) -> None:
    """As exporters write ``nms(boxes[mask], scores[mask])``: places are those among the chosen boxes."""
    generator = np.random.default_rng(seed)
    feeds = {"boxes": generator.random((20, 4), np.float32) * 9, "scores": generator.random(20, np.float32)}
    make = helper.make_node
    nodes = [
        make("Greater", ["scores", "least"], ["sure"]),
        make("NonZero", ["sure"], ["places"]),
        make("Transpose", ["places"], ["rows"], perm=[1, 0]),
        make("GatherND", ["boxes", "rows"], ["chosen"]),
        make("GatherND", ["scores", "rows"], ["chosen_scores"]),
        make("Unsqueeze", ["chosen", "zero"], ["boxes_of_one"]),
        make("Unsqueeze", ["chosen_scores", "two"], ["scores_of_one"]),
        make("NonMaxSuppression", ["boxes_of_one", "scores_of_one", "most", "overlap"], ["picked"]),
        make("Gather", ["picked", "last"], ["place"], axis=1),
        make("Gather", ["chosen", "place"], ["kept"]),
    ]
    weights = {
        "least": np.array(least, np.float32), "zero": ints(0), "two": ints(0, 1), "most": ints(100),
        "overlap": np.array([0.3], np.float32), "last": np.array(2, np.int64),
    }  # fmt: skip
    path = save_model(tmp_path / "m.onnx", nodes, feeds, ["kept"], weights)
    compared(path, feeds)


@pytest.mark.parametrize("most", [3, 90, 200])
def test_rows_filled_up_to_a_fixed_number(tmp_path: Path, most: int) -> None:
    """As exporters write ``F.pad(x, (0, most - len(x)))``: by how much is computed from how many there are."""
    generator = np.random.default_rng(3)
    feeds = {
        "boxes": generator.random((1, 30, 4), np.float32) * 20,
        "scores": generator.random((1, 3, 30), np.float32),
    }
    make = helper.make_node
    nodes = [
        make("NonMaxSuppression", ["boxes", "scores", "some", "overlap"], ["picked"]),
        make("Cast", ["picked"], ["numbers"], to=1),
        make("Slice", ["numbers", "zero", "most", "zero"], ["first"]),
        make("Add", ["first", "unit"], ["shifted"]),
        make("Reshape", ["shifted", "flat"], ["line"]),
        make("Shape", ["line"], ["length"]),
        make("Sub", ["whole", "length"], ["missing"]),
        make("Concat", ["zero", "missing"], ["pads"], axis=0),
        make("Pad", ["line", "pads"], ["filled"]),
        make("Reshape", ["filled", "rows"], ["detections"]),
    ]
    weights = {
        "some": ints(1000), "overlap": np.array([0.4], np.float32), "zero": ints(0), "most": ints(most),
        "unit": np.array([1], np.float32), "flat": ints(-1), "whole": ints(3 * most), "rows": ints(most, 3),
    }  # fmt: skip
    path = save_model(tmp_path / "m.onnx", nodes, feeds, ["detections"], weights)
    imported = compared(path, feeds)
    assert [info.shape for info in imported.outputs] == [(most, 3)]


def test_a_graph_that_ends_before_a_suppression(tmp_path: Path) -> None:
    path, feeds = chain(tmp_path)
    imported = import_onnx(path, cut=["flat"])
    assert [info.name for info in imported.inputs] == ["boxes"]
    assert [info.name for info in imported.outputs] == ["flat"]
    np.testing.assert_array_equal(run_module(imported, feeds)[0], feeds["boxes"][0])


@pytest.mark.parametrize(
    ("name", "said"),
    [("flatt", "did you mean flat"), ("boxes", "no node of the graph makes that value"), ("", "no node")],
)
def test_an_end_that_is_not_there(tmp_path: Path, name: str, said: str) -> None:
    path, _ = chain(tmp_path)
    with pytest.raises(UsageError) as found:
        import_onnx(path, cut=[name])
    assert said in str(found.value)
    assert "\n" not in str(found.value)


def test_an_end_that_uses_no_input(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["a", "a"], ["twice"]), helper.make_node("Mul", ["x", "twice"], ["y"])]
    path = save_model(tmp_path / "m.onnx", nodes, {"x": floats(3)}, ["y"], {"a": floats(3)})
    with pytest.raises(UsageError, match="uses no input"):
        import_onnx(path, cut=["twice"])


def test_a_refusal_names_a_value_to_end_at(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["positive"]),
        helper.make_node("Unique", ["positive"], ["values"], name="distinct"),
    ]
    path = save_model(tmp_path / "m.onnx", nodes, {"x": floats(3)}, ["values"])
    with pytest.raises(UnsupportedOpError, match="--cut=positive"):
        import_onnx(path)


def test_boxes_that_do_not_fit_their_scores(tmp_path: Path) -> None:
    feeds = {"boxes": floats(1, 5, 4), "scores": floats(1, 2, 6)}
    node = helper.make_node("NonMaxSuppression", ["boxes", "scores", "most"], ["picked"])
    path = save_model(tmp_path / "m.onnx", [node], feeds, ["picked"], {"most": ints(2)})
    with pytest.raises(SourceError, match="boxes of shape"):
        import_onnx(path)
