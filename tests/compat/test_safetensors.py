from __future__ import annotations

import sys
import threading
import types

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from edgeship.compat import safetensors as compat


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.ones(2)}, path)
    return path


def homes() -> dict[str, object]:
    found = {}
    for name, module in list(sys.modules.items()):
        value = getattr(module, "__dict__", {}).get("safe_open")
        if value is not None:
            found[name] = value
    return found


def test_files_are_told_inside_alone(weights) -> None:
    seen = []
    with compat.opened_files(seen.append):
        load_file(weights)
        with safetensors.safe_open(weights, "pt") as file:
            assert file.get_tensor("w").tolist() == [1, 1]
    load_file(weights)
    assert seen == [weights, weights]


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_has_its_function_again(weights, fails) -> None:
    before = homes()
    assert len(before) >= 2
    late = types.ModuleType("edgeship_test_late")
    try:
        with compat.opened_files(print):
            assert all(value is not safetensors.SafetensorError for value in homes().values())
            assert homes()["safetensors"] is not before["safetensors"]
            late.safe_open = safetensors.safe_open
            sys.modules[late.__name__] = late
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    finally:
        del sys.modules[late.__name__]
    assert late.safe_open is before["safetensors"]
    assert homes() == before


def test_blocks_may_overlap_and_end_in_any_order(weights) -> None:
    before, first, second = homes(), [], []
    one, other = compat.opened_files(first.append), compat.opened_files(second.append)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    load_file(weights)
    other.__exit__(None, None, None)
    load_file(weights)
    assert (first, second) == ([], [weights])
    assert homes() == before


def test_blocks_in_threads(weights) -> None:
    before, counts = homes(), []

    def watch() -> None:
        for _ in range(20):
            seen = []
            with compat.opened_files(seen.append):
                load_file(weights)
            counts.append(len(seen))

    threads = [threading.Thread(target=watch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Those of other threads are told as well.
    assert len(counts) == 80
    assert min(counts) >= 1
    assert homes() == before
