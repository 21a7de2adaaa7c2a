"""Sums that a constant divides afterwards become means, which have no end on Hexagon."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgeship.core.model import TensorSpec, TorchModel
from edgeship.core.passes import Context
from edgeship.lowering.qnn.whole import rewrite_graph
from edgeship.passes.lower.onnx_to_qnn import OnnxToQnn
from edgeship.passes.lower.torch_to_onnx import TorchToOnnx
from edgeship.program.export import make_program
from edgeship.runtimes.qnn.runtime import RUNTIME

SHAPE = (2, 3, 4)


def rewritten(folder: Path, op: str, number: float, axes: list[int], keepdims: int, first: bool, shown: bool):
    """The file before and after, and its operators after."""
    shape = [
        1 if axis in axes and keepdims else size for axis, size in enumerate(SHAPE) if keepdims or axis not in axes
    ]
    inputs = ["number", "sum"] if first else ["sum", "number"]
    outputs = ["y", *(["sum"] if shown else [])]
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["x", "axes"], ["sum"], keepdims=keepdims), helper.make_node(op, inputs, ["y"])],
        "means",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs],
        [
            numpy_helper.from_array(np.array(number, np.float32), "number"),
            numpy_helper.from_array(np.array(axes, np.int64), "axes"),
        ],
    )
    before, after = folder / "a.onnx", folder / "b.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), before)
    rewrite_graph(before, after, 75)
    return before, after, [node.op_type for node in onnx.load(after).graph.node]


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["Mul", "Div"]), st.sampled_from([1 / 24, 1 / 3, 0.3, -0.01, 1.5, 12.0, 24.0]),
    st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_it_answers_the_same(tmp_path_factory, op, number, axes, keepdims, first, shown):
    folder = tmp_path_factory.mktemp("means")
    before, after, kinds = rewritten(folder, op, number, axes, int(keepdims), first, shown)
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    wanted, found = (onnxruntime.InferenceSession(path).run(None, {"x": x}) for path in (before, after))
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)
    divided = abs(number if op == "Mul" else 1 / number) < 1
    changed = divided and not shown and not (op == "Div" and first)
    assert ("ReduceMean" in kinds) == changed


class Norm(nn.Module):
    """A norm over time by sums of squares, as other frameworks write it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(1, T, C)`` to the same."""
        mean = x.sum(1, keepdim=True) * (1 / x.shape[1])
        spread = (x * x).sum(1, keepdim=True) * (1 / x.shape[1]) - mean * mean
        return (x - mean) / (spread.relu() + 1e-6).sqrt()


def test_a_norm_whose_sum_of_squares_leaves_float16_is_right_on_hexagon(tmp_path):
    pytest.importorskip("onnxruntime_qnn")
    x = 30 * torch.randn(1, 512, 8, generator=torch.Generator().manual_seed(0))
    program = make_program(Norm().eval(), [TensorSpec("x", "f32", (1, 512, 8))], [x])
    program.save(tmp_path / "program")
    for name in ("onnx", "qnn"):
        (tmp_path / name).mkdir()
    lowered = TorchToOnnx().run(TorchModel(tmp_path / "program", program.signature), Context(tmp_path / "onnx"))
    artifact = OnnxToQnn(soc_model=57, htp_arch=75).run(lowered, Context(tmp_path / "qnn"))
    wanted = Norm()(x).numpy()
    with RUNTIME.open(artifact) as session:
        (found,) = session.run({"x": x.numpy()}).values()
    assert 10 * np.log10(np.square(wanted).sum() / np.square(found - wanted).sum()) > 45
