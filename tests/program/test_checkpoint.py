"""Checkpoints are read as torch reads them, by a reader that calls nothing."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import pickle
import struct
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeship.errors import SourceError, UnsafeSourceError
from edgeship.program.checkpoint import open_checkpoint, read_checkpoint
from edgeship.program.pickled import named_in
from edgeship.program.pickled_values import Name, PlainObject, TensorRecord

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hostile import PICKLES

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn,
]  # fmt: skip


def back(value: object, *, zipped: bool = True) -> object:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    buffer.seek(0)
    checkpoint = read_checkpoint(buffer, "c.pt")

    def whole(item: object) -> object:
        if isinstance(item, TensorRecord):
            return checkpoint.tensor(item)
        if isinstance(item, dict):
            return {key: whole(inner) for key, inner in item.items()}
        return type(item)(map(whole, item)) if isinstance(item, (list, tuple)) else item

    return whole(checkpoint.content)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype(dtype, zipped):
    value = torch.arange(24).reshape(2, 3, 4).to(dtype)
    found = back({"a": value, "b": value.transpose(0, 2)[1:], "c": value[:0]}, zipped=zipped)
    for name, wanted in {"a": value, "b": value.transpose(0, 2)[1:], "c": value[:0]}.items():
        assert found[name].dtype == dtype
        assert found[name].shape == wanted.shape
        assert torch.equal(found[name].view(torch.uint8) if dtype.itemsize == 1 else found[name],
                           wanted.view(torch.uint8) if dtype.itemsize == 1 else wanted)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), start=st.integers(0, 3), step=st.integers(1, 3),
    zipped=st.booleans(),
)  # fmt: skip
def test_windows_on_a_storage(shape, start, step, zipped):
    base = torch.randn(*shape)
    view = base.flatten()[start::step]
    base_back, view_back = back([base, view], zipped=zipped)
    assert torch.equal(base_back, base)
    assert torch.equal(view_back, view)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_trainers_put_beside_the_weights(zipped):
    model = torch.nn.BatchNorm1d(3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    saved = {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "best": np.float64(0.75),
        "history": [np.float32(1.5)] * 3,
        "confusion": np.arange(6).reshape(2, 3).T,
        "args": argparse.Namespace(lr=0.1, out=Path("/tmp/x"), betas=(0.9, 0.99)),
        "other": types.SimpleNamespace(a=1),
        "counts": collections.Counter("aab"),
        "by_class": collections.defaultdict(list, {1: [2]}),
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda:0"),
        "seen": {"a", "b"},
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "raw": b"\x00\xff",
    }
    found = back(saved, zipped=zipped)
    for name, value in model.state_dict().items():
        assert torch.equal(found["state_dict"][name], value)
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert (found["epoch"], found["best"], found["history"]) == (3, 0.75, [1.5] * 3)
    assert np.array_equal(found["confusion"], saved["confusion"])
    assert isinstance(found["args"], PlainObject)
    assert found["args"].attributes == {"lr": 0.1, "out": "/tmp/x", "betas": (0.9, 0.99)}
    assert found["counts"] == {"a": 2, "b": 1}
    assert found["by_class"] == {1: [2]}
    assert found["dtype"] == Name("torch.bfloat16")
    assert found["size"] == (2, 3)
    assert found["seen"] == {"a", "b"}
    assert found["raw"] == b"\x00\xff"


def test_two_names_of_one_storage_share_it():
    value = torch.randn(3)
    one, two = back([value, value])
    assert one.data_ptr() == two.data_ptr()


@pytest.mark.parametrize("name", PICKLES)
def test_nothing_runs(tmp_path, name):
    path = PICKLES[name](tmp_path / "w.pt", tmp_path / "canary")
    with pytest.raises(UnsafeSourceError, match="holds more than tensors: "):
        open_checkpoint(path)
    assert not (tmp_path / "canary").exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert (tmp_path / "canary").exists(), "the file is harmless, so the test shows nothing"


BOMBS = {
    "a memo of 2**31 entries": b"\x80\x02K\x01r\xff\xff\xff\x7f.",
    "a text of 2**60 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.",
    "a bytearray of 2**40 bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "bytearray(2**40)": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
    "nested lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "nested tuples as a key": b"\x80\x02}K\x01" + b"\x85" * 200_000 + b"K\x01s.",
    "nested tuples in a frozenset": b"\x80\x04(K\x01" + b"\x85" * 200_000 + b"\x91.",
    "an empty stack": b"\x80\x02R.",
    "no end": b"\x80\x02]",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent id": b"\x80\x02K\x01Q.",
    "an attribute": b"\x80\x02ccollections\nOrderedDict\n)R}U\x09__class__K\x01sb.",
    "numbers in a list that is a text": b"\x80\x02U\x01aK\x01a.",
    "a dtype of objects": b"\x80\x02cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_at_once(tmp_path, name):
    (tmp_path / "w.pt").write_bytes(BOMBS[name])
    begin = time.monotonic()
    try:
        open_checkpoint(tmp_path / "w.pt")
    except SourceError as error:
        assert error.fix
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [((10**9,), (1,), 0), ((4,), (2,), 0), ((4,), (1,), 1), ((10**6, 10**6), (0, 0), 0), ((4,), (1,), 2**62)],
)
def test_a_tensor_of_more_numbers_than_there_are(shape, strides, offset):
    buffer = io.BytesIO()
    torch.save(torch.ones(4), buffer)
    buffer.seek(0)
    checkpoint = read_checkpoint(buffer, "w.pt")
    record = checkpoint.content
    with pytest.raises(SourceError):
        checkpoint.tensor(TensorRecord(record.storage, record.dtype, offset, shape, strides))


def weight_in(path: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(path)
    return checkpoint.tensor(checkpoint.content["w"])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_anywhere_ends_in_a_reason(tmp_path, zipped):
    torch.save({"w": torch.ones(40)}, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "whole.pt").read_bytes()
    for length in range(0, len(content), max(1, len(content) // 60)):
        (tmp_path / "w.pt").write_bytes(content[:length])
        with pytest.raises(SourceError):
            weight_in(tmp_path / "w.pt")


def test_names_are_told_without_loading():
    assert "argparse.Namespace" in named_in(pickle.dumps(argparse.Namespace(a=1), protocol=2))
    assert "collections.OrderedDict" in named_in(pickle.dumps(collections.OrderedDict(), protocol=4))
    assert named_in(b"\x80\x02c") == ["what cannot be read"]
