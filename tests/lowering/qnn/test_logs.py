"""A tiny floor in front of a logarithm, or a tiny constant added there: zeros still have the floor's logarithm."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeship.lowering.qnn.whole import rewrite_graph

X = np.array([[0, 1e-12, 1e-6, 1e-3, 1, 5000]], np.float32)
SQUARES = {"": [], "Mul": ["x", "x"], "Pow": ["x", "two"]}


def answer(folder: Path, guard: str, floor: float, square: str = "", *, first: bool = False) -> np.ndarray:
    """What the rewritten graph answers for `X`."""
    source = "squared" if square else "x"
    inputs = ["least", source] if first else [source, "least"]
    nodes = [helper.make_node(square, SQUARES[square], ["squared"])] if square else []
    nodes += [helper.make_node(guard, inputs, ["guarded"]), helper.make_node("Log", ["guarded"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "logs",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6])],
        [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in (("least", floor), ("two", 2))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "a.onnx")
    rewrite_graph(folder / "a.onnx", folder / "b.onnx", 75)
    assert guard not in {node.op_type for node in onnx.load(folder / "b.onnx").graph.node} or guard == "Add"
    (found,) = onnxruntime.InferenceSession(folder / "b.onnx").run(None, {"x": X})
    return np.asarray(found)


@pytest.mark.parametrize(("guard", "first"), [("Clip", False), ("Max", False), ("Max", True)])
@pytest.mark.parametrize("square", SQUARES)
def test_a_floor_below_float16_is_kept(tmp_path, guard, first, square):
    wanted = np.log(np.maximum(X**2 if square else X, np.float32(1e-10)))
    np.testing.assert_allclose(answer(tmp_path, guard, 1e-10, square, first=first), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("floor", [1e-5, 1e-7, 1e-9, 1e-10, 1e-12])
def test_a_constant_that_is_added_is_a_floor(tmp_path, floor, square, first):
    wanted = np.log((X.astype(float) ** 2 if square else X.astype(float)) + floor)
    # A constant that float16 has no steps for goes where it is small beside what is there.
    np.testing.assert_allclose(answer(tmp_path, "Add", floor, square, first=first), wanted, rtol=3e-2, atol=1e-4)


def test_a_floor_that_float16_holds_stays(tmp_path):
    with pytest.raises(AssertionError):
        answer(tmp_path, "Max", 1e-3)
