"""Tensors on disk: read and written one at a time, by part, and refused when they are damaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file
from safetensors.torch import save_file

from edgeship.core.weights import Affine, AffineTensor
from edgeship.errors import ArtifactError, WeightsError
from edgeship.program.stored import (
    EncodedStore,
    Overlay,
    TensorFile,
    TensorWriter,
    WeightStore,
    open_floats,
    save_floats,
)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_what_is_written_is_safetensors(tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("w") / "t.safetensors"
    dtypes = st.sampled_from([np.float32, np.float16, np.int8, np.uint8, np.int64, np.bool_])
    shapes = arrays.array_shapes(min_dims=0, max_dims=3, max_side=5)
    made = {f"t{i}": data.draw(arrays.arrays(data.draw(dtypes), data.draw(shapes))) for i in range(3)}
    with TensorWriter(path, 3) as writer:
        for name, array in made.items():
            writer.add(name, array)
    theirs, ours = load_file(path), TensorFile(path)
    for name, array in made.items():
        np.testing.assert_array_equal(theirs[name], array)
        np.testing.assert_array_equal(ours.read(name), array)


def test_rows_and_bfloat16(tmp_path) -> None:
    values = torch.randn(7, 5)
    save_file({"a": values.bfloat16(), "b": values.half(), "c": values}, tmp_path / "t.safetensors")
    store = WeightStore.of_file(tmp_path / "t.safetensors")
    assert torch.equal(store["a"], values.bfloat16().float())
    assert torch.equal(store["b"], values.half().float())
    assert torch.equal(store.rows("a", 2, 5), values[2:5].bfloat16().float())
    assert torch.equal(store.rows("c", 6, 9), values[6:])


@pytest.mark.parametrize("keep", [3, 20, 60, -1])
def test_a_cut_file_is_refused(tmp_path, keep) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.ones(50)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"truncated|not readable"):
        TensorFile(path)


def test_programs_link_what_did_not_change(tmp_path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    save_floats({"a": torch.ones(4), "b": torch.zeros(3)}, first)
    save_floats(Overlay(open_floats(first), {"b": torch.full((3,), 2.0)}), second)
    found = open_floats(second)
    assert torch.equal(found["a"], torch.ones(4))
    assert torch.equal(found["b"], torch.full((3,), 2.0))
    assert (first / "weights.safetensors").stat().st_ino == (second / "weights.safetensors").stat().st_ino
    (second / "weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match="no longer exists"):
        open_floats(second)


def test_encoded_weights_are_read_back_one_by_one(tmp_path) -> None:
    store = EncodedStore.create(tmp_path / "e.safetensors", 2)
    values = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    tensor = AffineTensor(values, np.ones((3, 1), np.float32), None, Affine(4))
    store["w"] = tensor
    with pytest.raises(KeyError):
        store["w"] = tensor
    opened = store.close()
    assert list(opened) == ["w"]
    np.testing.assert_array_equal(opened["w"].arrays()["values"], values)
    with pytest.raises(ArtifactError, match="lacks the encoded weight v"):
        EncodedStore(tmp_path / "e.safetensors", {"w": Affine(4), "v": Affine(4)})
