"""Files as their makers saved them: any name, any spelling of an open dimension, fixed inputs, branches, halves."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgeship.core.model import TensorSpec
from edgeship.data.specs import parse_input
from edgeship.errors import SourceError, UnsupportedOpError
from edgeship.frontends.onnx.importer import ImportedOnnx, import_onnx
from edgeship.program.export import make_program

GENERATOR = np.random.default_rng(3)
FLOAT, HALF, WHOLE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64


def _info(name: str, shape: Sequence[int | str] | None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _weight(name: str, *shape: int, dtype: str = "float32") -> TensorProto:
    return numpy_helper.from_array(GENERATOR.standard_normal(shape).astype(dtype), name)


def _save(
    folder: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: Sequence[TensorProto] = (),
) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(constants))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _same(path: Path, imported: ImportedOnnx, feeds: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    """The module answers as onnxruntime does on the file itself."""
    session = onnxruntime.InferenceSession(path)
    wanted = session.run(None, feeds)
    given = [torch.from_numpy(np.asarray(feeds[item.name]).astype(item.dtype)) for item in imported.inputs]
    with torch.no_grad():
        found = imported.module(*given)
    for want, have in zip(wanted, found, strict=True):
        assert tuple(have.shape) == want.shape
        np.testing.assert_allclose(have.numpy(), want.astype(have.numpy().dtype), rtol=tolerance, atol=tolerance)


def test_awkward_names_become_clean_ones_and_are_kept(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["in put", "x_0"], ["y:0"]),
        helper.make_node("Relu", ["y:0"], ["y_0"]),
        helper.make_node("Neg", ["x:0"], ["class"]),
        helper.make_node("Identity", ["in put"], ["état"]),
    ]
    inputs = [_info("in put", [2, 4]), _info("x:0", [1, 3]), _info("9 unused", [1])]
    outputs = [_info(name, None) for name in ("y:0", "y_0", "class", "état")]
    path = _save(tmp_path, nodes, inputs, outputs, [_weight("x_0", 4, 4)])
    imported = import_onnx(path)
    _same(path, imported, {"in put": GENERATOR.standard_normal((2, 4)).astype("f"), "x:0": np.ones((1, 3), "f"),
                           "9 unused": np.ones(1, "f")})  # fmt: skip
    specs = [TensorSpec(item.name, "f32", item.shape) for item in imported.inputs]
    examples = [torch.randn(spec.shape) for spec in specs]
    program = make_program(imported.module, specs, examples, output_names=[item.name for item in imported.outputs])
    # x_0 is a weight's name, y_0 an output's own.
    assert [(spec.name, spec.source) for spec in program.signature.inputs] == [
        ("in_put", "in put"), ("x_0_2", "x:0"), ("input_9_unused", "9 unused"),
    ]  # fmt: skip
    assert [(spec.name, spec.source) for spec in program.signature.outputs] == [
        ("y_0_2", "y:0"), ("y_0", None), ("output_class", "class"), ("etat", "état"),
    ]  # fmt: skip
    assert any("x_0_2" in entry for entry in program.record.history)


@pytest.mark.parametrize("open_size", ["?", "unk__7", "N", -1, 0])
def test_an_open_dimension_has_a_way_out_that_can_be_typed(tmp_path: Path, open_size: int | str) -> None:
    nodes = [helper.make_node("GlobalAveragePool", ["x:0"], ["y"])]
    path = _save(tmp_path, nodes, [_info("x:0", [open_size, 3, 8, 8])], [_info("y", None)])
    with pytest.raises(SourceError, match="has no fixed size") as caught:
        import_onnx(path)
    words = shlex.split(caught.value.fix)
    given = [parse_input(word) for option, word in itertools.pairwise(words) if option == "--input"]
    imported = import_onnx(path, sizes={spec.name: spec.shape for spec in given})
    assert imported.inputs[0].shape == (1, 3, 8, 8)


def test_question_marks_are_sizes_of_their_own(tmp_path: Path) -> None:
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["y"])]
    path = _save(tmp_path, nodes, [_info("x", [-1, 3, "?", "?"])], [_info("y", None)])
    assert import_onnx(path, sizes={"x": (1, 3, 4, 9)}).inputs[0].shape == (1, 3, 4, 9)


def _branches(folder: Path, condition: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], width: int) -> Path:
    def body(name: str, weight: str, size: int) -> onnx.GraphProto:
        return helper.make_graph(
            [helper.make_node("MatMul", ["x", weight], [name])], name, [], [_info(name, [1, size])]
        )

    node = helper.make_node("If", ["c"], ["y"], then_branch=body("t", "w1", 8), else_branch=body("e", "w2", width))
    constants = [_weight("w1", 16, 8), _weight("w2", 16, width)]
    constants += [numpy_helper.from_array(np.array(16000), "rate"), numpy_helper.from_array(np.array(0.5, "f"), "half")]
    return _save(folder, [*condition, node], [_info("x", [1, 16]), *inputs], [_info("y", None)], constants)


@pytest.mark.parametrize("rate", [16000, 8000])
@pytest.mark.parametrize("width", [8, 4])
def test_a_branch_on_an_input_is_settled_by_its_value(tmp_path: Path, rate: int, width: int) -> None:
    condition = [helper.make_node("Equal", ["sr", "rate"], ["c"])]
    path = _branches(tmp_path, condition, [_info("sr", [], WHOLE)], width)
    imported = import_onnx(path, values={"sr": rate})
    assert [item.name for item in imported.inputs] == ["x"]
    assert imported.remarks == (f"input sr is fixed at {rate}",)
    x = GENERATOR.standard_normal((1, 16)).astype("f")
    session = onnxruntime.InferenceSession(path)
    wanted = session.run(None, {"x": x, "sr": np.array(rate)})[0]
    np.testing.assert_allclose(imported.module(torch.from_numpy(x))[0].numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", [16000, 8000])
def test_a_branch_whose_sides_agree_in_shape_needs_no_value(tmp_path: Path, rate: int) -> None:
    path = _branches(tmp_path, [helper.make_node("Equal", ["sr", "rate"], ["c"])], [_info("sr", [], WHOLE)], 8)
    _same(path, import_onnx(path), {"x": GENERATOR.standard_normal((1, 16)).astype("f"), "sr": np.array(rate)})


def test_a_branch_that_needs_a_value_says_which(tmp_path: Path) -> None:
    path = _branches(tmp_path, [helper.make_node("Equal", ["sr", "rate"], ["c"])], [_info("sr", [], WHOLE)], 4)
    with pytest.raises(UnsupportedOpError, match="another shape or type in each branch") as caught:
        import_onnx(path)
    assert caught.value.fix == "fix its value: --input sr=16000; or end the graph before it with --cut=c"


@pytest.mark.parametrize("mean", [-1.0, 2.0])
def test_a_branch_on_a_computed_value_is_both_sides(tmp_path: Path, mean: float) -> None:
    condition = [
        helper.make_node("ReduceMean", ["x"], ["m"], keepdims=1),
        helper.make_node("Greater", ["m", "half"], ["c"]),
    ]
    path = _branches(tmp_path, condition, [], 8)
    _same(path, import_onnx(path), {"x": np.full((1, 16), mean, "f")})


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.5, "its value is none"), ([[1, 2], [3]], "is not a tensor"), ([1, 2], "dimensions"), (float("inf"), "")],
)
def test_a_value_that_does_not_fit_is_refused(tmp_path: Path, value: object, words: str) -> None:
    path = _branches(tmp_path, [helper.make_node("Equal", ["sr", "rate"], ["c"])], [_info("sr", [], WHOLE)], 8)
    with pytest.raises(SourceError, match=words):
        import_onnx(path, values={"sr": value})


@pytest.mark.parametrize("outside", [HALF, FLOAT])
def test_half_precision_is_computed_in_float32(tmp_path: Path, outside: int) -> None:
    nodes = [] if outside == HALF else [helper.make_node("Cast", ["x"], ["x16"], to=HALF)]
    first, last = ("x", "y") if outside == HALF else ("x16", "y16")
    nodes += [
        helper.make_node("Conv", [first, "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceL2", ["c"], ["l"], axes=[1], keepdims=1),
        helper.make_node("Max", ["l", "floor"], ["m"]),
        helper.make_node("Div", ["c", "m"], [last]),
    ]
    nodes += [] if outside == HALF else [helper.make_node("Cast", ["y16"], ["y"], to=FLOAT)]
    constants = [_weight("w", 4, 3, 3, 3, dtype="float16"), _weight("b", 4, dtype="float16")]
    constants.append(numpy_helper.from_array(np.float16(1e-4), "floor"))
    path = _save(tmp_path, nodes, [_info("x", [1, 3, 6, 6], outside)], [_info("y", [1, 4, 6, 6], outside)], constants)
    imported = import_onnx(path)
    assert (imported.inputs[0].dtype, imported.outputs[0].dtype) == ("float32", "float32")
    assert bool(imported.remarks) == (outside == HALF)
    x = GENERATOR.standard_normal((1, 3, 6, 6)).astype("float16" if outside == HALF else "f")
    _same(path, imported, {"x": x}, tolerance=3e-3)


@pytest.mark.parametrize("inside", [False, True])
def test_nodes_may_stand_before_what_they_read(tmp_path: Path, inside: bool) -> None:
    """onnxruntime's converter to float16 lists casts of inputs and around blocked operators last."""
    nodes = [
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Exp", ["x"], ["a"]),
        helper.make_node("Neg", ["x"], ["b"]),
        helper.make_node("Mul", ["d", "a"], ["y"]),
    ]
    nodes = [nodes[4], *nodes[:4]]
    if inside:
        body = helper.make_graph(nodes, "body", [], [_info("y", None)])
        truth = helper.make_node("Constant", [], ["t"], value=numpy_helper.from_array(np.array(True)))
        nodes = [truth, helper.make_node("If", ["t"], ["z"], then_branch=body, else_branch=body)]
    path = _save(tmp_path, nodes, [_info("x", [2, 3])], [_info("z" if inside else "y", None)])
    imported = import_onnx(path)
    x = GENERATOR.standard_normal((2, 3)).astype("f")
    found = imported.module(torch.from_numpy(x))[0].numpy()
    np.testing.assert_allclose(found, np.maximum(np.exp(x) - x, 0) * np.exp(x), rtol=1e-5, atol=1e-6)


def test_nodes_that_read_each_other_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["y"]), helper.make_node("Relu", ["y"], ["b"])]
    path = _save(tmp_path, nodes, [_info("x", [2])], [_info("y", None)])
    with pytest.raises(SourceError, match="which nothing before it produces"):
        import_onnx(path)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("blocked", [[], ["Softmax", "Conv"]])
def test_what_a_converter_to_half_precision_writes(tmp_path: Path, keep: bool, blocked: list[str]) -> None:
    float16 = pytest.importorskip("onnxruntime.transformers.float16")
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Softmax", ["r"], ["s"], axis=1),
        helper.make_node("Mul", ["s", "k"], ["y"]),
    ]
    constants = [_weight("w", 4, 3, 3, 3), _weight("b", 4), numpy_helper.from_array(np.float32(0.1), "k")]
    path = _save(tmp_path, nodes, [_info("x", [1, 3, 6, 6])], [_info("y", [1, 4, 6, 6])], constants)
    made = float16.convert_float_to_float16(onnx.load(path), keep_io_types=keep, op_block_list=blocked)
    onnx.save(made, path)
    x = GENERATOR.standard_normal((1, 3, 6, 6)).astype("f" if keep else "float16")
    _same(path, import_onnx(path), {"x": x}, tolerance=3e-3)


def test_bounds_at_infinity_are_no_weights(tmp_path: Path) -> None:
    nodes = [helper.make_node("Max", ["low", "x"], ["a"]), helper.make_node("Add", ["a", "mask"], ["y"])]
    mask = numpy_helper.from_array(np.array([[0, -np.inf, 0]], "f"), "mask")
    low = numpy_helper.from_array(np.full((1, 1), -np.inf, "f"), "low")
    path = _save(tmp_path, nodes, [_info("x", [2, 3])], [_info("y", None)], [mask, low])
    imported = import_onnx(path)
    assert not list(imported.module.parameters())
    _same(path, imported, {"x": GENERATOR.standard_normal((2, 3)).astype("f")})


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e3])
@pytest.mark.parametrize("keep", [0, 1])
def test_a_length_is_right_in_float16_at_any_scale(tmp_path: Path, scale: float, keep: int) -> None:
    node = helper.make_node("ReduceL2", ["x"], ["y"], axes=[1], keepdims=keep)
    path = _save(tmp_path, [node], [_info("x", [2, 8, 3])], [_info("y", None)])
    imported = import_onnx(path)
    x = (scale * GENERATOR.standard_normal((2, 8, 3))).astype("f")
    _same(path, imported, {"x": x})
    with torch.no_grad():
        half = imported.module(torch.from_numpy(x).half())[0].float().numpy()
    np.testing.assert_allclose(half, np.linalg.norm(x, axis=1, keepdims=bool(keep)), rtol=3e-3, atol=1e-6)
