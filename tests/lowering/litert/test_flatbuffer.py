from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgeship.compression.affine import quantize_nearest
from edgeship.core.weights import Affine, same_numbers
from edgeship.errors import ArtifactError
from edgeship.lowering.litert.flatbuffer import parse, write
from edgeship.runtimes.litert.checked import open_checked
from edgeship.runtimes.litert.runtime import RUNTIME


@pytest.fixture(scope="module")
def artifact(layers_program, with_encoded, lower_to_tflite):
    encoded = {"first.weight": quantize_nearest(layers_program.weight("first.weight"), Affine(4))}
    return lower_to_tflite(with_encoded(layers_program, encoded))


def _outputs(artifact):
    draw = np.random.default_rng(0)
    inputs = {"x": draw.normal(size=(1, 3, 16, 16)).astype(np.float32), "ids": np.arange(5, dtype=np.int32)[None]}
    with RUNTIME.open(artifact) as session:
        return session.run(inputs)


def test_constants_lie_on_sixteen_bytes(artifact):
    file = open_checked(artifact.path)
    start = np.frombuffer(file.content, np.uint8).ctypes.data
    places = [
        file.data(index).ctypes.data - start for index in range(file.root.BuffersLength()) if file.data(index).size
    ]
    assert len(places) > 10
    assert all(place % 16 == 0 for place in places)


def test_large_files_keep_constants_behind_the_flatbuffer(artifact, tmp_path):
    model = parse(artifact.path.read_bytes())
    path = tmp_path / "model.tflite"
    write(model, path, max_inline_bytes=0)
    moved = replace(artifact, path=path)
    file = open_checked(path)
    offsets = [file.root.Buffers(i).Offset() for i in range(file.root.BuffersLength())]
    assert all(offset % 64 == 0 for offset in offsets)
    assert sum(offset > 0 for offset in offsets) > 10
    want, have = _outputs(artifact), _outputs(moved)
    assert all(np.array_equal(want[name], have[name]) for name in want)
    inline, behind = RUNTIME.read_weights(artifact), RUNTIME.read_weights(moved)
    assert inline.keys() == behind.keys()
    assert all(same_numbers(inline[name], behind[name]) == "" for name in inline)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="ends before its weights"):
        RUNTIME.open(moved)


def test_writing_leaves_the_model_as_it_was(artifact, tmp_path):
    model = parse(artifact.path.read_bytes())
    write(model, tmp_path / "behind.tflite", max_inline_bytes=0)
    write(model, tmp_path / "inline.tflite")
    assert (tmp_path / "inline.tflite").read_bytes() == artifact.path.read_bytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_take_the_bytes_that_are_stated(bits, layers_program, with_encoded, lower_to_tflite):
    encoding = Affine(bits)
    encoded = {"first.weight": quantize_nearest(layers_program.weight("first.weight"), encoding)}
    artifact = lower_to_tflite(with_encoded(layers_program, encoded))
    model = parse(artifact.path.read_bytes())
    (stored,) = [item.stored for item in artifact.placements if item.weight == "first.weight"]
    (tensor,) = [item for item in model.subgraphs[0].tensors if item.name.decode() == stored]
    grid = tensor.quantization
    size = len(model.buffers[tensor.buffer].data) + 4 * len(grid.scale) + 8 * len(grid.zeroPoint)
    use = next(use for use in layers_program.record.inventory.weights if use.name == "first.weight")
    assert size == RUNTIME.stored_bits(use, encoding) // 8
