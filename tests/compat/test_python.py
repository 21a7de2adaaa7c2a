from __future__ import annotations

import io
import os
import pickle
import sys
import threading
from typing import ClassVar

import pytest

from edgeship.compat import python as compat


def test_the_reader_of_pickles_in_python_has_a_table() -> None:
    class Reader(compat.PlainUnpickler):
        dispatch: ClassVar = dict(compat.PlainUnpickler.dispatch)

        def find_class(self, module, name):
            raise AssertionError("looked up")

    content = pickle.dumps({"a": [1, 2.0, b"3"]})
    assert Reader(io.BytesIO(content)).load() == {"a": [1, 2.0, b"3"]}
    assert all(isinstance(code, int) and callable(call) for code, call in Reader.dispatch.items())
    assert pickle.REDUCE[0] in Reader.dispatch
    assert pickle.BUILD[0] in Reader.dispatch


def test_exit_functions_run_once() -> None:
    import subprocess

    lines = "import atexit; from edgeship.compat.python import run_exit_functions"
    lines += "; atexit.register(lambda: print('left')); run_exit_functions(); print('done')"
    found = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["left", "done"]


def test_files_are_told_inside_alone(tmp_path) -> None:
    seen = []
    path = tmp_path / "a.txt"
    listen = lambda name, writing: seen.append((name, bool(writing)))  # noqa: E731
    path.write_text("before")
    with compat.opened_files(listen):
        path.write_text("in")
        path.read_text()
        os.close(os.open(path, os.O_RDONLY))
        thread = threading.Thread(target=path.read_text)
        thread.start()
        thread.join()
    path.read_text()
    found = [writing for name, writing in seen if str(name) == str(path)]
    assert found == [True, False, False, False]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_kept_after_the_block(tmp_path, fails) -> None:
    seen = []
    try:
        with compat.opened_files(lambda *event: seen.append(event)):
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert compat._listeners == ()
    seen.clear()
    (tmp_path / "a").write_bytes(b"")
    assert seen == []


def test_there_is_one_hook_however_often(monkeypatch) -> None:
    with compat.opened_files(print):
        pass
    added = []
    monkeypatch.setattr(sys, "addaudithook", added.append)
    for _ in range(3):
        with compat.opened_files(lambda *_: None):
            pass
    assert added == []


def test_blocks_may_overlap_and_end_in_any_order(tmp_path) -> None:
    first, second = [], []
    one = compat.opened_files(lambda name, _: first.append(str(name)))
    other = compat.opened_files(lambda name, _: second.append(str(name)))
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    (tmp_path / "b").write_bytes(b"")
    other.__exit__(None, None, None)
    (tmp_path / "c").write_bytes(b"")
    assert first == []
    assert second == [str(tmp_path / "b")]
