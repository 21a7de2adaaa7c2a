"""What a file of arrays unpacks to is known before it is unpacked."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgeship.data.numpy_files import check_numpy_file
from edgeship.errors import DataError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))
from cases import bomb, npy


@pytest.mark.parametrize("compressed", [False, True])
def test_honest_files(tmp_path, compressed):
    arrays = {"x": np.ones((3, 4), np.float32), "label": np.arange(3), "e": np.ones((0, 4)), "s": np.array(["ab", "c"])}
    (np.savez_compressed if compressed else np.savez)(tmp_path / "d.npz", **arrays)
    check_numpy_file(tmp_path / "d.npz")
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", np.asfortranarray(array))
        check_numpy_file(tmp_path / f"{name}.npy")


def test_a_bomb_is_not_unpacked(tmp_path):
    bomb(tmp_path / "d.npz", 9)
    assert (tmp_path / "d.npz").stat().st_size < 20 << 20
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"unpacks to 9\.66 GB"):
        check_numpy_file(tmp_path / "d.npz")
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    "content",
    [
        npy((2**40, 4), "<f4", bytes(64)), npy((-1, 4), "<f4", bytes(64)), npy((2**62, 2**62), "<f4", bytes(64)),
        npy(("4", 4), "<f4", bytes(64)), npy((4.0, 4), "<f4", bytes(64)), npy((4, 4), "|O", bytes(128)), b"", b"\x93NUMPY",
        b"PK\x03\x04", npy((4, 4), "<f4", bytes(60)), b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, b"text",
    ],
)  # fmt: skip
def test_what_does_not_fit(tmp_path, content):
    (tmp_path / "d.npy").write_bytes(content)
    with pytest.raises(DataError) as raised:
        check_numpy_file(tmp_path / "d.npy")
    assert raised.value.fix
