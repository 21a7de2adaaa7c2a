"""A tiny floor in front of a logarithm: behind the rewrite zeros still have the floor's logarithm."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edgeship.lowering.qnn.graph import rewrite_graph


def test_a_floor_below_float16_is_kept(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Clip", ["x", "least"], ["clipped"]), helper.make_node("Log", ["clipped"], ["y"])],
        "logs",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6])],
        [numpy_helper.from_array(np.array(1e-10, np.float32), "least")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "a.onnx")
    rewrite_graph(tmp_path / "a.onnx", tmp_path / "b.onnx", 75)
    written = onnx.load(tmp_path / "b.onnx")
    assert "Clip" not in {node.op_type for node in written.graph.node}
    x = np.array([[0, 1e-12, 1e-6, 1e-3, 1, 5000]], np.float32)
    (found,) = onnxruntime.InferenceSession(tmp_path / "b.onnx").run(None, {"x": x})
    np.testing.assert_allclose(found, np.log(np.maximum(x, np.float32(1e-10))), rtol=1e-5, atol=1e-5)
