"""Fused and integer layers as onnxruntime's optimizer and quantizers write them, against onnxruntime on the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgeship.frontends.onnx.importer import import_onnx
from tests.processors import needs_exact_products

RANDOM = np.random.default_rng(5)
MS = "com.microsoft"
TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int32): TensorProto.INT32,
         np.dtype(np.int64): TensorProto.INT64, np.dtype(bool): TensorProto.BOOL}  # fmt: skip


def check(
    folder: Path, nodes: list[onnx.NodeProto], feeds: dict[str, np.ndarray], constants: dict[str, np.ndarray],
    outputs: list[str], *, tolerance: float = 1e-4, opset: int = 17,
) -> object:  # fmt: skip
    """The imported module answers as onnxruntime; what is imported is given back."""
    made = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    inputs = [helper.make_tensor_value_info(name, TYPES[x.dtype], list(x.shape)) for name, x in feeds.items()]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_empty_tensor_value_info(name) for name in outputs], made)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MS, 1)]
    path = folder / "m.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString())
    return same(path, feeds, tolerance)


def same(path: Path, feeds: dict[str, np.ndarray], tolerance: float) -> object:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options)
    wanted = session.run(None, feeds)
    imported = import_onnx(path)
    with torch.no_grad():
        found = imported.module(*(torch.from_numpy(feeds[item.name]) for item in imported.inputs))
    for want, have in zip(wanted, found, strict=True):
        assert tuple(have.shape) == want.shape
        spread = max(float(np.abs(want).max()), 1.0)
        np.testing.assert_allclose(have.numpy(), want, rtol=tolerance, atol=tolerance * spread)
    return imported


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Each test draws the same numbers, whatever ran before it: one step of a dynamic grid is more than a tolerance."""
    RANDOM.bit_generator.state = np.random.default_rng(5).bit_generator.state


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


MASKS = {
    "none": None,
    "rows": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32),
    "ends": np.array([3, 5], np.int32),
    "ends and starts": np.array([3, 5, 1, 0], np.int32),
    "squares": (RANDOM.random((2, 5, 5)) > 0.3).astype(np.int32),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [0, 1])
def test_attention(tmp_path: Path, mask: str, causal: int) -> None:
    feeds = {"x": floats(2, 5, 8)}
    names = ["x", "w", "b"]
    if MASKS[mask] is not None:
        feeds["m"] = MASKS[mask]
        names.append("m")
    node = helper.make_node("Attention", names, ["y"], domain=MS, num_heads=2, unidirectional=causal)
    check(tmp_path, [node], feeds, {"w": floats(8, 24), "b": floats(24)}, ["y"])


def test_attention_with_a_past_and_a_scale(tmp_path: Path) -> None:
    feeds = {"x": floats(1, 3, 8), "past": floats(2, 1, 2, 4, 4)}
    node = helper.make_node("Attention", ["x", "w", "b", "", "past"], ["y", "kv"], domain=MS, num_heads=2, scale=0.3)
    check(tmp_path, [node], feeds, {"w": floats(8, 24), "b": floats(24)}, ["y", "kv"])


def test_attention_with_a_sum_on_the_scores(tmp_path: Path) -> None:
    feeds = {"x": floats(1, 3, 8), "added": floats(1, 2, 3, 3)}
    node = helper.make_node("Attention", ["x", "w", "b", "", "", "added"], ["y"], domain=MS, num_heads=2)
    check(tmp_path, [node], feeds, {"w": floats(8, 24), "b": floats(24)}, ["y"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_multi_head_attention(tmp_path: Path, bias: bool, mask: bool) -> None:
    feeds = {"q": floats(2, 4, 8), "k": floats(2, 5, 8), "v": floats(2, 5, 8)}
    names = ["q", "k", "v", "b" if bias else ""]
    if mask:
        feeds["m"] = MASKS["rows"]
        names.append("m")
    node = helper.make_node("MultiHeadAttention", names, ["y"], domain=MS, num_heads=2)
    check(tmp_path, [node], feeds, {"b": floats(24)}, ["y"])


@needs_exact_products
@pytest.mark.parametrize("dynamic", [True, False])
def test_quantized_attention(tmp_path: Path, dynamic: bool) -> None:
    nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"])]
    constants = {"w": RANDOM.integers(-127, 127, (8, 24)).astype(np.int8), "ws": np.float32(0.01), "b": floats(24),
                 "wz": np.int8(0)}  # fmt: skip
    if not dynamic:
        constants |= {"xs": np.float32(0.03), "xz": np.uint8(128)}
        nodes = [helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"])]
    names = ["xq", "w", "b", "xs", "ws", "m", "xz", "wz"]
    nodes.append(helper.make_node("QAttention", names, ["y"], domain=MS, num_heads=2))
    imported = check(tmp_path, nodes, {"x": floats(2, 5, 8), "m": MASKS["rows"]}, constants, ["y"], tolerance=0.02)
    assert list(imported.encoded) == ["w"]
    assert imported.is_dynamic == dynamic


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_embeddings_with_their_norm(tmp_path: Path, segments: bool, mask: bool) -> None:
    feeds = {"ids": RANDOM.integers(0, 20, (2, 5)).astype(np.int32)}
    names = ["ids", "", "words", "places", "", "gamma", "beta"]
    constants = {"words": floats(20, 8), "places": floats(9, 8), "gamma": floats(8), "beta": floats(8)}
    if segments:
        feeds["kinds"] = RANDOM.integers(0, 2, (2, 5)).astype(np.int32)
        constants["segments"] = floats(2, 8)
        names[1], names[4] = "kinds", "segments"
    if mask:
        feeds["mask"] = MASKS["rows"]
        names.append("mask")
    node = helper.make_node("EmbedLayerNormalization", names, ["y", "counted"], domain=MS, epsilon=1e-6)
    check(tmp_path, [node], feeds, constants, ["y", "counted"])


def test_embeddings_in_integers(tmp_path: Path) -> None:
    shapes = {"words": (20, 8), "places": (9, 8), "segments": (2, 8), "gamma": (8,), "beta": (8,)}
    constants: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        constants[name] = RANDOM.integers(0, 255, shape).astype(np.uint8)
        constants[f"{name}_s"] = np.float32(0.01)
        constants[f"{name}_z"] = np.uint8(120)
    feeds = {"ids": RANDOM.integers(0, 20, (2, 5)).astype(np.int32), "mask": MASKS["rows"],
             "kinds": RANDOM.integers(0, 2, (2, 5)).astype(np.int32)}  # fmt: skip
    names = ["ids", "kinds", *shapes, "mask", *(f"{name}_s" for name in shapes), *(f"{name}_z" for name in shapes)]
    node = helper.make_node("QEmbedLayerNormalization", names, ["y", "counted"], domain=MS)
    imported = check(tmp_path, [node], feeds, constants, ["y", "counted"], tolerance=2e-3)
    assert "words" in imported.encoded


@pytest.mark.parametrize("name", ["DynamicQuantizeMatMul", "MatMulIntegerToFloat"])
@pytest.mark.parametrize("by_column", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_integer_products_in_one_node(tmp_path: Path, name: str, by_column: bool, bias: bool) -> None:
    constants = {"w": RANDOM.integers(0, 255, (16, 6)).astype(np.uint8), "b": floats(6)}
    constants["ws"] = (RANDOM.random(6) * 0.02).astype(np.float32) if by_column else np.float32(0.01)
    constants["wz"] = np.full(6, 120, np.uint8) if by_column else np.uint8(120)
    last = ["b"] if bias else []
    if name == "DynamicQuantizeMatMul":
        nodes = [helper.make_node(name, ["x", "w", "ws", "wz", *last], ["y"], domain=MS)]
    else:
        nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"])]
        nodes.append(helper.make_node(name, ["xq", "w", "xs", "ws", "xz", "wz", *last], ["y"], domain=MS))
    imported = check(tmp_path, nodes, {"x": floats(3, 16)}, constants, ["y"], tolerance=0.02)
    assert list(imported.encoded) == ["w"]
    assert imported.is_dynamic


def test_a_choice_between_integers(tmp_path: Path) -> None:
    scales = {"as": np.float32(0.05), "az": np.uint8(100), "bs": np.float32(0.03), "bz": np.uint8(128),
              "ys": np.float32(0.05), "yz": np.uint8(110)}  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["a", "as", "az"], ["aq"]),
        helper.make_node("QuantizeLinear", ["b", "bs", "bz"], ["bq"]),
        helper.make_node("QLinearWhere", ["c", "aq", "as", "az", "bq", "bs", "bz", "ys", "yz"], ["yq"], domain=MS),
        helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
    ]
    feeds = {"a": floats(2, 9), "b": floats(2, 9), "c": RANDOM.random((2, 9)) > 0.5}
    check(tmp_path, nodes, feeds, scales, ["y"], tolerance=0.051)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [True, False])
def test_weights_in_blocks_stay_integers(tmp_path: Path, bits: int, zeros: bool) -> None:
    rows, columns, block = 6, 64, 32
    size = block * bits // 8
    constants = {"w": RANDOM.integers(0, 255, (rows, columns // block, size)).astype(np.uint8),
                 "s": (RANDOM.random((rows, columns // block)) * 0.1 + 0.01).astype(np.float32)}  # fmt: skip
    names = ["x", "w", "s"]
    if zeros:
        constants["z"] = RANDOM.integers(0, 255, (rows, columns // block * bits // 8)).astype(np.uint8)
        names.append("z")
    node = helper.make_node("MatMulNBits", names, ["y"], domain=MS, N=rows, K=columns, bits=bits, block_size=block)
    imported = check(tmp_path, [node], {"x": floats(3, columns)}, constants, ["y"], tolerance=1e-3)
    (tensor,) = imported.encoded.values()
    assert (tensor.encoding.bits, tensor.encoding.group_size) == (bits, block)


@pytest.mark.parametrize("zeros", [True, False])
def test_rows_of_a_table_in_blocks(tmp_path: Path, zeros: bool) -> None:
    constants = {"w": RANDOM.integers(0, 255, (20, 32)).astype(np.uint8),
                 "s": (RANDOM.random((20, 2)) * 0.1).astype(np.float32)}  # fmt: skip
    names = ["w", "ids", "s"]
    if zeros:
        constants["z"] = RANDOM.integers(0, 255, (20, 1)).astype(np.uint8)
        names.append("z")
    node = helper.make_node("GatherBlockQuantized", names, ["y"], domain=MS, bits=4, block_size=32)
    feeds = {"ids": RANDOM.integers(0, 20, (2, 3)).astype(np.int64)}
    imported = check(tmp_path, [node], feeds, constants, ["y"], tolerance=1e-4)
    assert list(imported.encoded) == ["w"]


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("name", ["QLinearGlobalAveragePool", "QLinearAveragePool"])
def test_integer_pools_in_either_layout(tmp_path: Path, name: str, last: int) -> None:
    grid = {"s": np.float32(0.03), "z": np.uint8(128)}
    sizes = {"kernel_shape": [2, 2], "strides": [2, 2]} if name == "QLinearAveragePool" else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node(name, ["xq", "s", "z", "s", "z"], ["yq"], domain=MS, channels_last=last, **sizes),
        helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["y"]),
    ]
    check(tmp_path, nodes, {"x": floats(1, 4, 4, 4)}, grid, ["y"], tolerance=0.031)
