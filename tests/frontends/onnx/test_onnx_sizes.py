"""Symbolic dimensions need a size; the error says for which input, and how to give it."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import TensorProto, helper

from edgeship.errors import SourceError
from edgeship.frontends.onnx.importer import import_onnx


def _model(path: Path, *shapes: list[str | int] | None) -> Path:
    names = ["image", "mask"][: len(shapes)]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(names, shapes, strict=True)]
    node = helper.make_node("Sum", names, ["y"])
    graph = helper.make_graph([node], "g", inputs, [helper.make_empty_tensor_value_info("y")])
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString())
    return path


def test_an_open_dimension_is_named_with_its_way_out(tmp_path: Path) -> None:
    path = _model(tmp_path / "m.onnx", ["batch", 3, "h", "w"])
    with pytest.raises(SourceError, match='input "image": dimension 0 "batch" has no fixed size') as caught:
        import_onnx(path)
    assert "--input image:f32[1,3,224,224]" in str(caught.value)


def test_a_size_settles_a_name_everywhere(tmp_path: Path) -> None:
    path = _model(tmp_path / "m.onnx", ["batch", "n"], ["batch", "n"])
    imported = import_onnx(path, sizes={"image": (2, 7)})
    assert [info.shape for info in imported.inputs] == [(2, 7), (2, 7)]
    assert imported.outputs[0].shape == (2, 7)


@pytest.mark.parametrize(
    ("shape", "size", "words"),
    [
        (["b", 3], (1, 3, 5), "has 2 dimensions, the size given has 3"),
        (["b", 3], (1, 4), "dimension 1 is 3, not 4"),
        (["b", 3], (-1, 3), "cannot have the size"),
    ],
)
def test_a_size_that_does_not_fit(tmp_path: Path, shape: list[str | int], size: tuple[int, ...], words: str) -> None:
    with pytest.raises(SourceError, match=words):
        import_onnx(_model(tmp_path / "m.onnx", shape), sizes={"image": size})


def test_one_name_cannot_have_two_sizes(tmp_path: Path) -> None:
    path = _model(tmp_path / "m.onnx", ["b", 3], ["b", 3])
    with pytest.raises(SourceError, match=r'dimension 0 \("b"\) is 2, not 4'):
        import_onnx(path, sizes={"image": (2, 3), "mask": (4, 3)})


def test_a_size_for_an_unknown_input(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match='no input "imagr"; did you mean "image"'):
        import_onnx(_model(tmp_path / "m.onnx", ["b", 3]), sizes={"imagr": (2, 3)})


def test_an_input_without_any_shape(tmp_path: Path) -> None:
    path = _model(tmp_path / "m.onnx", None)
    with pytest.raises(SourceError, match='input "image" has no shape'):
        import_onnx(path)
    assert import_onnx(path, sizes={"image": (2, 3)}).outputs[0].shape == (2, 3)
