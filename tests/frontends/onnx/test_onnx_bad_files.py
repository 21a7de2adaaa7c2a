"""Bad input ends in one line that names the trouble and the way out, never in a traceback."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import convert_model_to_external_data
from onnx_files import floats, ints, run_module, save_model

from edgeship.errors import (
    EdgeshipError,
    SourceError,
    UnsafeSourceError,
    UnsupportedOpError,
    WeightsError,
)
from edgeship.frontends.onnx.importer import import_onnx


def _message(path: Path, kind: type[EdgeshipError], **options: object) -> str:
    with pytest.raises(kind) as caught:
        import_onnx(path, **options)  # type: ignore[arg-type]
    assert type(caught.value) is kind
    assert caught.value.fix, "an error says what to do next"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _matmul(folder: Path) -> Path:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return save_model(folder / "m.onnx", [node], {"x": floats(2, 5)}, ["y"], {"w": floats(5, 3)})


def _external(folder: Path, location: str = "weights.bin") -> tuple[Path, onnx.ModelProto]:
    """A model whose one weight lies in weights.bin, and its protobuf with the reference already set."""
    path = _matmul(folder)
    model = onnx.load(path)
    convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    onnx.save(model, path)
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())
    return path, model


def test_missing_file(tmp_path: Path) -> None:
    assert "no ONNX file at" in _message(tmp_path / "none.onnx", SourceError)
    assert "no ONNX file at" in _message(tmp_path, SourceError)


@pytest.mark.parametrize("data", [b"", b"\x08\x07", b"PK\x03\x04 a zip", b"not a model at all" * 9])
def test_not_onnx(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    assert "m.onnx" in _message(path, SourceError)


def test_initializer_too_short(tmp_path: Path) -> None:
    path = _matmul(tmp_path)
    model = onnx.load(path)
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-8]
    path.write_bytes(model.SerializeToString())
    assert 'initializer "w" holds 52 bytes, its shape float32[5, 3] needs 60' in _message(path, WeightsError)


def test_initializer_fields_too_short(tmp_path: Path) -> None:
    path = _matmul(tmp_path)
    model = onnx.load(path)
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].float_data.extend([1.0, 2.0])
    path.write_bytes(model.SerializeToString())
    assert 'initializer "w" holds 8 bytes' in _message(path, WeightsError)


def test_external_data_is_read(tmp_path: Path) -> None:
    path, _ = _external(tmp_path)
    x = floats(2, 5)
    np.testing.assert_allclose(run_module(import_onnx(path), {"x": x})[0], x @ floats(5, 3), rtol=1e-5)


def test_external_data_missing(tmp_path: Path) -> None:
    path, _ = _external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    assert '"weights.bin", which is not beside m.onnx' in _message(path, WeightsError)


def test_external_data_cut_short(tmp_path: Path) -> None:
    path, _ = _external(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"1234")
    assert '"weights.bin" has 4 bytes' in _message(path, WeightsError)


@pytest.mark.parametrize(
    "location",
    ["../weights.bin", "sub/../../weights.bin", "/etc/hostname", "..\\weights.bin", "C:\\weights.bin", "", "a\0b"],
)
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path, _ = _external(folder, location)
    (folder / "weights.bin").rename(tmp_path / "weights.bin")
    assert "outside the model's folder" in _message(path, UnsafeSourceError)


def test_external_data_behind_a_link(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path, _ = _external(folder)
    (folder / "weights.bin").rename(tmp_path / "elsewhere.bin")
    (folder / "weights.bin").symlink_to(tmp_path / "elsewhere.bin")
    assert "a link that leaves the folder" in _message(path, UnsafeSourceError)


def test_download_caches_link_both_files_to_one_folder(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir(), snapshot.mkdir()
    path, _ = _external(blobs)
    (snapshot / "model.onnx").symlink_to(path)
    (snapshot / "weights.bin").symlink_to(blobs / "weights.bin")
    assert import_onnx(snapshot / "model.onnx").inputs[0].shape == (2, 5)


@pytest.mark.parametrize(("key", "value"), [("offset", "-4"), ("offset", "x"), ("offset", "9" * 30), ("length", "1")])
def test_external_data_with_a_wrong_place(tmp_path: Path, key: str, value: str) -> None:
    path, model = _external(tmp_path)
    tensor = model.graph.initializer[0]
    for entry in list(tensor.external_data):
        if entry.key == key:
            tensor.external_data.remove(entry)
    tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    assert 'initializer "w"' in _message(path, WeightsError)


def test_unknown_operator_is_named_with_its_place(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("Frobnicate", ["h"], ["y"], name="frob", domain="my.domain"),
    ]
    path = save_model(tmp_path / "m.onnx", nodes, {"x": floats(2)}, ["y"], domains={"my.domain": 1})
    assert 'my.domain::Frobnicate "frob" (node 1 of the graph)' in _message(path, UnsupportedOpError)


def test_domain_without_an_opset(tmp_path: Path) -> None:
    node = helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
    path = save_model(tmp_path / "m.onnx", [node], {"x": floats(2)}, ["y"])
    assert "names no opset" in _message(path, SourceError)


def test_opset_of_the_future(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], {"x": floats(2)}, ["y"], opset=999)
    assert "opset 999 is newer than" in _message(path, SourceError)


def test_operator_younger_than_the_opset(tmp_path: Path) -> None:
    node = helper.make_node("SwiGLU", ["x", "x"], ["y"])
    path = save_model(tmp_path / "m.onnx", [node], {"x": floats(2)}, ["y"], opset=12)
    assert "opset 12 has no such operator" in _message(path, UnsupportedOpError)


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = _matmul(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"\x01x", b"\x01\xff"))
    assert "m.onnx contradicts itself" in _message(path, SourceError)


def test_a_value_that_no_node_makes(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["h"], ["y"], name="late"), helper.make_node("Abs", ["y"], ["h"])]
    path = save_model(tmp_path / "m.onnx", nodes, {"x": floats(2)}, ["y"])
    assert 'reads "h", which nothing before it produces' in _message(path, SourceError)


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")
    path = save_model(tmp_path / "m.onnx", [node], {"x": floats(2, 4)}, ["y"], {"w": floats(5, 3)})
    assert 'MatMul "fc" (node 0 of the graph)' in _message(path, SourceError)


def test_a_shape_that_depends_on_the_data(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "s"], ["y"])]
    path = save_model(tmp_path / "m.onnx", nodes, {"x": floats(4), "s": ints(2, 2)}, ["y"])
    assert 'the shape must be a constant and depends on input "s"' in _message(path, UnsupportedOpError)


def test_branch_on_data(tmp_path: Path) -> None:
    def body(name: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        kind = "Identity" if name == "a" else "ReduceSum"
        return helper.make_graph([helper.make_node(kind, ["x"], [name])], name, [], [value])

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Cast", ["total"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], then_branch=body("a"), else_branch=body("b")),
    ]
    path = save_model(tmp_path / "m.onnx", nodes, {"x": floats(2)}, ["y"])
    message = _message(path, UnsupportedOpError)
    assert 'its condition depends on input "x", and output 0 has another shape or type in each branch' in message


def test_random_numbers_training_and_strings_are_declined(tmp_path: Path) -> None:
    node = helper.make_node("RandomNormalLike", ["x"], ["y"])
    path = save_model(tmp_path / "m.onnx", [node], {"x": floats(2)}, ["y"])
    assert "random numbers" in _message(path, UnsupportedOpError)
    node = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y", "mm", "vv"], training_mode=1)
    statistics = {name: np.abs(floats(3, seed=i)) for i, name in enumerate("sbmv")}
    path = save_model(tmp_path / "m.onnx", [node], {"x": floats(2, 3)}, ["y"], statistics)
    assert "training mode" in _message(path, UnsupportedOpError)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.STRING, [1])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, [1])],
    )
    path.write_bytes(helper.make_model(graph).SerializeToString())
    assert '"x" holds string' in _message(path, UnsupportedOpError)


def test_sequences_do_not_cross_the_border(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, [1])],
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    assert '"x" is a sequence' in _message(path, UnsupportedOpError)


def test_a_function_that_calls_itself(tmp_path: Path) -> None:
    body = [helper.make_node("F", ["a"], ["b"], domain="d")]
    function = helper.make_function("d", "F", ["a"], ["b"], body, [helper.make_opsetid("d", 1)])
    nodes = [helper.make_node("F", ["x"], ["y"], domain="d")]
    path = save_model(tmp_path / "m.onnx", nodes, {"x": floats(2)}, ["y"], domains={"d": 1}, functions=[function])
    assert "nested too deeply" in _message(path, SourceError)


def test_an_absurd_size_is_not_allocated(tmp_path: Path) -> None:
    nodes = [helper.make_node("Tile", ["w", "n"], ["y"])]
    path = save_model(tmp_path / "m.onnx", nodes, {}, ["y"], {"w": floats(64), "n": ints(1 << 40)})
    assert "the result would have the shape" in _message(path, SourceError)


def _damaged(data: bytes, chance: random.Random) -> bytes:
    """Cut, or with some bytes overwritten, removed or doubled."""
    kind = chance.randrange(4)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 6)):
        place = chance.randrange(len(changed))
        if kind == 1:
            changed[place] = chance.randrange(256)
        elif kind == 2:
            del changed[place : place + chance.randrange(1, 9)]
        else:
            changed[place:place] = changed[place : place + chance.randrange(1, 9)]
    return bytes(changed)


def _fuzz_model(folder: Path) -> Path:
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("BatchNormalization", ["c", "b", "b", "b", "v"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2]),
        helper.make_node("Resize", ["p", "", "scales"], ["u"], mode="linear"),
        helper.make_node("Shape", ["u"], ["s"]),
        helper.make_node("Slice", ["s", "zero", "one"], ["batch"]),
        helper.make_node("Concat", ["batch", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["u", "target"], ["f"]),
        helper.make_node("Transpose", ["f"], ["t"], perm=[1, 0]),
        helper.make_node("Pad", ["t", "pads"], ["q"]),
        helper.make_node("Gather", ["q", "index"], ["g"], axis=1),
        helper.make_node("Softmax", ["g"], ["y"], axis=0),
    ]
    weights = {
        "w": floats(4, 3, 3, 3), "b": floats(4), "v": np.abs(floats(4)), "zero": ints(0), "one": ints(1),
        "scales": np.array([1, 1, 2, 2], np.float32), "rest": ints(-1), "pads": ints(0, 1, 0, 1),
        "index": np.array([0, -1], np.int64),
    }  # fmt: skip
    return save_model(folder / "m.onnx", nodes, {"x": floats(1, 3, 8, 8)}, ["y"], weights)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_end_in_an_edgeship_error_or_a_module(tmp_path: Path, seed: int) -> None:
    path = _fuzz_model(tmp_path)
    import_onnx(path)
    data = path.read_bytes()
    chance = random.Random(seed)
    rounds = int(os.environ.get("EDGESHIP_FUZZ_ROUNDS", "60"))
    outcomes = {"module": 0, "error": 0}
    for _ in range(rounds):
        path.write_bytes(_damaged(data, chance))
        try:
            import_onnx(path)
        except EdgeshipError as error:
            outcomes["error"] += "\n" not in str(error)
        else:
            outcomes["module"] += 1
    assert outcomes["error"] > 0
    assert sum(outcomes.values()) == rounds


def test_an_initializer_that_is_a_graph_input_is_no_input(tmp_path: Path) -> None:
    x, w = floats(2, 5), floats(5, 3)
    model = onnx.load(_matmul(tmp_path))
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [5, 3]))
    (tmp_path / "old.onnx").write_bytes(model.SerializeToString())
    imported = import_onnx(tmp_path / "old.onnx")
    assert [info.name for info in imported.inputs] == ["x"]
    np.testing.assert_allclose(run_module(imported, {"x": x})[0], x @ w, rtol=1e-5)


def test_sparse_initializer(tmp_path: Path) -> None:
    values = numpy_helper.from_array(np.array([2.0, 3.0], np.float32), "w")
    indices = numpy_helper.from_array(np.array([0, 4], np.int64), "i")
    model = onnx.load(_matmul(tmp_path))
    del model.graph.initializer[:]
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [5, 3]))
    path = tmp_path / "sparse.onnx"
    path.write_bytes(model.SerializeToString())
    dense = np.zeros((5, 3), np.float32)
    dense[0, 0], dense[1, 1] = 2.0, 3.0
    x = floats(2, 5)
    np.testing.assert_allclose(run_module(import_onnx(path), {"x": x})[0], x @ dense, rtol=1e-5)
