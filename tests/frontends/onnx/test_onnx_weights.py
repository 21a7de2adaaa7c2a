"""Weights come out under their ONNX names, in the layout that torch's layers have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper
from onnx_files import assert_matches_onnxruntime, floats, ints, run_module, save_model

from edgeship.errors import WeightsError
from edgeship.frontends.onnx.importer import import_onnx


def _targets(module: torch.nn.Module) -> list[object]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_with_a_constant_is_a_linear_layer(tmp_path: Path, trans_b: int) -> None:
    x, w, b = floats(2, 5), floats(5, 3, seed=1), floats(3, seed=2)
    node = helper.make_node("Gemm", ["x", "fc.weight", "fc.bias"], ["y"], transB=trans_b)
    weights = {"fc.weight": w.T.copy() if trans_b else w, "fc.bias": b}
    imported = assert_matches_onnxruntime(save_model(tmp_path / "m.onnx", [node], {"x": x}, ["y"], weights), {"x": x})
    parameters = dict(imported.module.named_parameters())
    assert {name: tuple(p.shape) for name, p in parameters.items()} == {"fc.weight": (3, 5), "fc.bias": (3,)}
    assert not any(p.requires_grad for p in parameters.values())
    assert _targets(imported.module) == [torch.nn.functional.linear]


def test_gemm_scales_fold_into_the_weight(tmp_path: Path) -> None:
    x, w, b = floats(2, 5), floats(5, 3, seed=1), floats(3, seed=2)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], alpha=0.5, beta=2.0)
    imported = assert_matches_onnxruntime(
        save_model(tmp_path / "m.onnx", [node], {"x": x}, ["y"], {"w": w, "b": b}), {"x": x}
    )
    assert _targets(imported.module) == [torch.nn.functional.linear]


def test_matmul_with_a_constant_is_linear_and_shared_once(tmp_path: Path) -> None:
    x, w = floats(2, 4, 4), floats(4, 4, seed=1)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    imported = assert_matches_onnxruntime(save_model(tmp_path / "m.onnx", nodes, {"x": x}, ["y"], {"w": w}), {"x": x})
    parameters = dict(imported.module.named_parameters())
    assert list(parameters) == ["w"]
    assert np.array_equal(parameters["w"].numpy(), w.T)


def test_matmul_and_add_become_one_linear_layer(tmp_path: Path) -> None:
    x, w, b = floats(2, 7, 4), floats(4, 3, seed=1), floats(3, seed=2)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["b", "h"], ["y"])]
    path = save_model(tmp_path / "m.onnx", nodes, {"x": x}, ["y"], {"w": w, "b": b})
    imported = assert_matches_onnxruntime(path, {"x": x}, export=True)
    assert _targets(imported.module) == [torch.nn.functional.linear]
    assert sorted(name for name, _ in imported.module.named_parameters()) == ["b", "w"]


def test_gather_of_a_matrix_is_an_embedding(tmp_path: Path) -> None:
    ids, table = np.array([[1, 3, 0]], dtype=np.int64), floats(5, 4)
    node = helper.make_node("Gather", ["ids", "wte"], ["y"])
    node.input[:] = ["wte", "ids"]
    path = save_model(tmp_path / "m.onnx", [node], {"ids": ids}, ["y"], {"wte": table})
    imported = assert_matches_onnxruntime(path, {"ids": ids})
    assert _targets(imported.module) == [torch.nn.functional.embedding]
    assert [name for name, _ in imported.module.named_parameters()] == ["wte"]


def test_gather_of_data_takes_negative_indices(tmp_path: Path) -> None:
    x, index = floats(4, 3), np.array([-1, 0, -4], dtype=np.int64)
    node = helper.make_node("Gather", ["x", "i"], ["y"])
    assert_matches_onnxruntime(
        save_model(tmp_path / "m.onnx", [node], {"x": x, "i": index}, ["y"]), {"x": x, "i": index}
    )


def test_dequantized_constants_fold_to_a_float_weight(tmp_path: Path) -> None:
    x, q = floats(1, 3, 8, 8), np.random.default_rng(0).integers(-128, 127, (4, 3, 3, 3)).astype(np.int8)
    scale = np.abs(floats(4, seed=3)) / 100
    nodes = [
        helper.make_node("DequantizeLinear", ["conv.weight", "s", "z"], ["w"], axis=0),
        helper.make_node("Conv", ["x", "w"], ["y"]),
    ]
    weights = {"conv.weight": q, "s": scale, "z": np.zeros(4, np.int8)}
    path = save_model(tmp_path / "m.onnx", nodes, {"x": x}, ["y"], weights)
    imported = assert_matches_onnxruntime(path, {"x": x})
    (name, weight), *others = imported.module.named_parameters()
    assert name == "conv.weight"
    assert not others
    np.testing.assert_array_equal(weight.numpy(), q.astype(np.float32) * scale.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize(
    "names",
    [("a", "a.b"), ("a.b", "a"), ("forward", "graph"), ("class", "1"), ("w/x:0", "w_x_0"), ("a..b", "a.b")],
    ids="|".join,
)
def test_awkward_names_are_free_of_collisions(tmp_path: Path, names: tuple[str, str]) -> None:
    x = floats(2, 3)
    nodes = [helper.make_node("Mul", ["x", names[0]], ["h"]), helper.make_node("Add", ["h", names[1]], ["y"])]
    weights = {names[0]: floats(2, 3, seed=1), names[1]: floats(2, 3, seed=2)}
    path = save_model(tmp_path / "m.onnx", nodes, {"x": x}, ["y"], weights)
    imported = assert_matches_onnxruntime(path, {"x": x}, export=True)
    assert len(imported.module.state_dict()) == 2


@pytest.mark.parametrize("name", ["input.1", "class", "self", "1", "über"])
def test_awkward_input_names(tmp_path: Path, name: str) -> None:
    x = floats(2, 3)
    path = save_model(tmp_path / "m.onnx", [helper.make_node("Relu", [name], ["y"])], {name: x}, ["y"])
    imported = assert_matches_onnxruntime(path, {name: x}, export=True)
    assert imported.inputs[0].name == name


def test_the_exported_state_dict_has_the_onnx_names(tmp_path: Path) -> None:
    x = floats(1, 3, 8, 8)
    nodes = [
        helper.make_node("Conv", ["x", "stem.conv.weight", "stem.conv.bias"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["y"]),
    ]
    weights = {"stem.conv.weight": floats(4, 3, 3, 3, seed=1), "stem.conv.bias": floats(4, seed=2)}
    imported = import_onnx(save_model(tmp_path / "m.onnx", nodes, {"x": x}, ["y"], weights))
    program = torch.export.export(imported.module, (torch.from_numpy(x),), strict=False)
    assert sorted(program.state_dict) == sorted(weights)
    assert sorted(program.graph_signature.parameters) == sorted(weights)


def test_shape_arithmetic_leaves_no_trace(tmp_path: Path) -> None:
    x = floats(2, 3, 4)
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["h"]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Size", ["h"], ["size"]),
        helper.make_node("Cast", ["size"], ["count"], to=1),
        helper.make_node("Div", ["h", "count"], ["y"]),
    ]
    weights = {"zero": np.array(0, dtype=np.int64), "axes": ints(0), "rest": ints(-1)}
    path = save_model(tmp_path / "m.onnx", nodes, {"x": x}, ["y"], weights)
    imported = assert_matches_onnxruntime(path, {"x": x}, export=True)
    assert [target.__name__ for target in _targets(imported.module)] == ["reshape", "div"]
    assert not imported.module.state_dict()


def test_a_graph_of_constants_alone(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx", [helper.make_node("Add", ["a", "b"], ["y"])], {}, ["y"],
                      {"a": floats(2), "b": floats(2, seed=1)})  # fmt: skip
    imported = assert_matches_onnxruntime(path, {}, export=True)
    assert imported.inputs == ()
    assert imported.outputs[0].shape == (2,)


def test_an_input_that_is_an_output(tmp_path: Path) -> None:
    x = floats(2)
    path = save_model(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], {"x": x}, ["x", "y", "y"])
    results = run_module(import_onnx(path), {"x": x}, export=True)
    np.testing.assert_array_equal(results[0], x)
    np.testing.assert_array_equal(results[1], results[2])


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_a_damaged_weight_is_named(tmp_path: Path, value: float, word: str) -> None:
    x, w = floats(2, 5), floats(5, 3)
    w[1, 1] = value
    node = helper.make_node("MatMul", ["x", "fc.weight"], ["y"])
    path = save_model(tmp_path / "m.onnx", [node], {"x": x}, ["y"], {"fc.weight": w})
    with pytest.raises(WeightsError, match=rf'weight "fc.weight" has {word} values'):
        import_onnx(path)


def test_an_infinite_mask_is_no_damage(tmp_path: Path) -> None:
    x, mask = floats(2, 2), np.array([[0, -np.inf], [0, 0]], dtype=np.float32)
    nodes = [helper.make_node("Add", ["x", "mask"], ["h"]), helper.make_node("Softmax", ["h"], ["y"])]
    path = save_model(tmp_path / "m.onnx", nodes, {"x": x}, ["y"], {"mask": mask})
    assert_matches_onnxruntime(path, {"x": x})
