"""Graphs that would take hours end in seconds, with a reason."""

from __future__ import annotations

import time

import pytest
from onnx import helper
from onnx_files import floats, save_model

from edgeship.errors import EdgeshipError, LimitError, SourceError
from edgeship.frontends.onnx.counting import MAX_NODES
from edgeship.frontends.onnx.importer import import_onnx

OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("my", 1)]


def doubling(times: int) -> list[object]:
    """Functions, each of which calls the one before twice."""
    functions = []
    for index in range(times):
        inner, domain = (f"F{index - 1}", "my") if index else ("Neg", "")
        body = [
            helper.make_node(inner, ["a"], ["t"], domain=domain),
            helper.make_node(inner, ["t"], ["b"], domain=domain),
        ]
        functions.append(helper.make_function("my", f"F{index}", ["a"], ["b"], body, OPSETS))
    return functions


def saved(path, nodes, functions=()):
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", 1, [1, 4])], [helper.make_tensor_value_info("y", 1, None)]
    )
    model = helper.make_model(graph, functions=list(functions), opset_imports=OPSETS, ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("times", [18, 30, 64])
def test_bodies_that_double(tmp_path, times):
    call = [helper.make_node(f"F{times - 1}", ["x"], ["y"], domain="my")]
    begin = time.monotonic()
    with pytest.raises(LimitError, match="nodes with its functions"):
        import_onnx(saved(tmp_path / "m.onnx", call, doubling(times)))
    assert time.monotonic() - begin < 10


def test_bodies_that_double_a_few_times_are_written_out(tmp_path):
    call = [helper.make_node("F4", ["x"], ["y"], domain="my")]
    imported = import_onnx(saved(tmp_path / "m.onnx", call, doubling(5)))
    assert imported.outputs[0].shape == (1, 4)


def test_a_function_that_calls_itself(tmp_path):
    body = [helper.make_node("F", ["a"], ["b"], domain="my")]
    function = helper.make_function("my", "F", ["a"], ["b"], body, OPSETS)
    with pytest.raises(SourceError, match="without end"):
        import_onnx(saved(tmp_path / "m.onnx", [helper.make_node("F", ["x"], ["y"], domain="my")], [function]))


def test_more_layers_than_anything_has(tmp_path):
    count = MAX_NODES + 1
    nodes = [
        helper.make_node("Neg", [f"v{i}" if i else "x"], [f"v{i + 1}" if i + 1 < count else "y"]) for i in range(count)
    ]
    with pytest.raises(LimitError, match=f"{count} nodes"):
        import_onnx(saved(tmp_path / "m.onnx", nodes))


def test_a_value_larger_than_any_artifact(tmp_path):
    node = helper.make_node("Einsum", ["x", "x"], ["y"], equation="a,b->ab")
    path = save_model(tmp_path / "m.onnx", [node], {"x": floats(100_000)}, ["y"], {})
    with pytest.raises(EdgeshipError, match="makes a tensor of shape"):
        import_onnx(path)
