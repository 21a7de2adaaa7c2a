"""The same layer as opsets 7 to 21 write it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import NodeProto, helper
from onnx_files import assert_matches_onnxruntime, floats, ints, save_model

OPSETS = [7, 8, 9, 10, 11, 12, 13, 18, 21]


def _network(opset: int) -> tuple[list[NodeProto], dict[str, np.ndarray]]:
    """Convolution, norm, pool, a squeeze and excite, an upsampling, a classifier: in the spelling of ``opset``."""
    weights = {
        "w": floats(4, 3, 3, 3), "s": np.abs(floats(4, seed=1)), "b": floats(4, seed=2), "m": floats(4, seed=3),
        "v": np.abs(floats(4, seed=4)), "se": floats(4, 4, 1, 1, seed=5), "fc": floats(4 * 64, 5, seed=6),
        "fcb": floats(5, seed=7),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"]),
        *_call("Clip", "n", "k", opset, 11, {"min": 0.0, "max": 6.0}, weights),
        helper.make_node("MaxPool", ["k"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["p"], ["g"]),
        helper.make_node("Conv", ["g", "se"], ["e"]),
        helper.make_node("Sigmoid", ["e"], ["gate"]),
        helper.make_node("Mul", ["p", "gate"], ["q"]),
        *_upsample(opset, weights),
        *_call("Pad", "u", "pad", opset, 11, {"pads": [0, 0, 0, 0, 0, 0, 0, 0]}, weights),
        *_call("Slice", "pad", "cut", opset, 10, {"starts": [0, 0], "ends": [9, 9], "axes": [2, 3]}, weights),
        *_call("ReduceMean", "cut", "mean", opset, 18, {"axes": [1]}, weights, keepdims=1),
        helper.make_node("Sub", ["cut", "mean"], ["centred"]),
        *_call("Split", "centred", "left,right", opset, 13, {"split": [2, 2]}, weights, axis=1),
        helper.make_node("Concat", ["right", "left"], ["joined"], axis=1),
        *_call("Unsqueeze", "joined", "wide", opset, 13, {"axes": [1]}, weights),
        *_call("Squeeze", "wide", "narrow", opset, 13, {"axes": [1]}, weights),
        *_dropout(opset, weights),
        helper.make_node("Flatten", ["dropped"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "fc", "fcb"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["y"], axis=1),
    ]
    return nodes, weights


def _call(
    name: str,
    x: str,
    y: str,
    opset: int,
    inputs_since: int,
    values: dict[str, object],
    weights: dict,
    **attributes: int,
) -> list[NodeProto]:
    """Arguments as attributes before ``inputs_since``, as constant inputs from there on."""
    if opset < inputs_since:
        return [helper.make_node(name, [x], y.split(","), **values, **attributes)]
    for key, value in values.items():
        weights[f"{name}.{key}"] = np.array(value, np.float32 if isinstance(value, float) else np.int64)
    return [helper.make_node(name, [x, *(f"{name}.{key}" for key in values)], y.split(","), **attributes)]


def _upsample(opset: int, weights: dict[str, np.ndarray]) -> list[NodeProto]:
    if opset < 9:
        return [helper.make_node("Upsample", ["q"], ["u"], mode="nearest", scales=[1.0, 1.0, 2.0, 2.0])]
    weights["scales"] = np.array([1, 1, 2, 2], np.float32)
    if opset == 9:
        return [helper.make_node("Upsample", ["q", "scales"], ["u"], mode="nearest")]
    if opset == 10:
        return [helper.make_node("Resize", ["q", "scales"], ["u"], mode="nearest")]
    mode = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    weights["roi"] = np.zeros(0, np.float32)
    return [helper.make_node("Resize", ["q", "roi", "scales"], ["u"], **mode)]


def _dropout(opset: int, weights: dict[str, np.ndarray]) -> list[NodeProto]:
    if opset < 12:
        return [helper.make_node("Dropout", ["narrow"], ["dropped"], ratio=0.3)]
    weights["ratio"] = np.array(0.3, np.float32)
    return [helper.make_node("Dropout", ["narrow", "ratio"], ["dropped"])]


@pytest.mark.parametrize("opset", OPSETS)
def test_one_network_in_every_spelling(tmp_path: Path, opset: int) -> None:
    nodes, weights = _network(opset)
    x = floats(2, 3, 8, 8)
    path = save_model(tmp_path / "m.onnx", nodes, {"x": x}, ["y"], weights, opset=opset)
    imported = assert_matches_onnxruntime(path, {"x": x})
    assert imported.opset == opset
    targets = [node.target for node in imported.module.graph.nodes if node.op == "call_function"]
    assert F.linear in targets
    assert F.batch_norm in targets
    assert F.interpolate in targets


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax", "Hardmax"])
def test_softmax_meant_something_else_before_opset_13(tmp_path: Path, opset: int, axis: int, name: str) -> None:
    x = floats(2, 3, 4)
    path = save_model(
        tmp_path / "m.onnx", [helper.make_node(name, ["x"], ["y"], axis=axis)], {"x": x}, ["y"], opset=opset
    )
    assert_matches_onnxruntime(path, {"x": x})


def test_topk_over_three_opsets(tmp_path: Path) -> None:
    x = floats(3, 7)
    for opset, k in ((9, {"k": 2}), (10, {}), (11, {})):
        weights = {} if k else {"k": ints(2)}
        node = helper.make_node("TopK", ["x", *weights], ["v", "i"], **k)
        path = save_model(tmp_path / "m.onnx", [node], {"x": x}, ["v", "i"], weights, opset=opset)
        assert_matches_onnxruntime(path, {"x": x})


def test_layer_norm_spelled_out_is_put_together(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[-1]),
        helper.make_node("Sub", ["x", "mean"], ["d"]),
        helper.make_node("Pow", ["d", "two"], ["sq"]),
        helper.make_node("ReduceMean", ["sq"], ["var"], axes=[-1]),
        helper.make_node("Add", ["var", "eps"], ["shifted"]),
        helper.make_node("Sqrt", ["shifted"], ["std"]),
        helper.make_node("Div", ["d", "std"], ["normal"]),
        helper.make_node("Mul", ["normal", "ln.weight"], ["scaled"]),
        helper.make_node("Add", ["scaled", "ln.bias"], ["h"]),
        helper.make_node("Div", ["h", "root"], ["r"]),
        helper.make_node("Erf", ["r"], ["e"]),
        helper.make_node("Add", ["e", "one"], ["e1"]),
        helper.make_node("Mul", ["h", "e1"], ["he"]),
        helper.make_node("Mul", ["he", "half"], ["y"]),
    ]
    weights = {
        "ln.weight": floats(8, seed=1), "ln.bias": floats(8, seed=2), "two": np.array(2, np.float32),
        "eps": np.array(1e-5, np.float32), "root": np.array(2**0.5, np.float32), "one": np.array(1, np.float32),
        "half": np.array(0.5, np.float32),
    }  # fmt: skip
    x = floats(2, 3, 8)
    path = save_model(tmp_path / "m.onnx", nodes, {"x": x}, ["y"], weights, opset=12)
    imported = assert_matches_onnxruntime(path, {"x": x}, export=True)
    targets = [node.target for node in imported.module.graph.nodes if node.op == "call_function"]
    assert targets == [F.layer_norm, F.gelu]
    assert sorted(imported.module.state_dict()) == ["ln.bias", "ln.weight"]


def test_a_value_in_between_that_is_read_elsewhere_keeps_its_parts(tmp_path: Path) -> None:
    x, w, b = floats(2, 4), floats(4, 3, seed=1), floats(3, seed=2)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["y"]),
        helper.make_node("Relu", ["h"], ["z"]),
    ]
    path = save_model(tmp_path / "m.onnx", nodes, {"x": x}, ["y", "z"], {"w": w, "b": b})
    imported = assert_matches_onnxruntime(path, {"x": x})
    targets = [node.target for node in imported.module.graph.nodes if node.op == "call_function"]
    assert targets == [F.linear, torch.add, torch.relu]


@pytest.mark.parametrize(("scale", "target"), [(2.0, F.interpolate), (1.5, torch.index_select)])
def test_nearest_by_a_broken_factor_is_a_selection(tmp_path: Path, scale: float, target: object) -> None:
    x = floats(1, 2, 4, 6)
    node = helper.make_node(
        "Resize", ["x", "", "s"], ["y"], coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )
    weights = {"s": np.array([1, 1, scale, scale], np.float32)}
    imported = assert_matches_onnxruntime(save_model(tmp_path / "m.onnx", [node], {"x": x}, ["y"], weights), {"x": x})
    assert target in [node.target for node in imported.module.graph.nodes]
