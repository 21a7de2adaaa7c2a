"""Functions that users name, and arrays over a pipe."""

import io
import sys

import numpy as np
import pytest

from edgeship.data.frames import read_arrays, write_arrays
from edgeship.data.functions import check_function, load_function
from edgeship.errors import UsageError


def test_a_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 7")
    (tmp_path / "m.py").write_text("from neighbour_of_mine import VALUE\ndef f(): return VALUE")
    before = list(sys.path)
    assert load_function(f"{tmp_path / 'm.py'}:f")() == 7
    assert sys.path == before


def test_two_files_of_one_name_are_two_modules(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.py").write_text(f"def f(): return {name!r}")
    assert [load_function(f"{tmp_path / name / 'm.py'}:f")() for name in ("a", "b")] == ["a", "b"]


def test_a_function_of_a_package():
    assert load_function("os.path:join") is __import__("os").path.join


@pytest.mark.parametrize(("name", "way_out"), [("modl", "did you mean {m}:model?"), ("zzz", "it has model, other")])
def test_a_function_that_is_not_there_has_a_neighbour(tmp_path, name, way_out):
    file = tmp_path / "m.py"
    file.write_text("def model(): ...\ndef other(): ...\n")
    with pytest.raises(UsageError, match=f"m.py has no function {name}") as raised:
        load_function(f"{file}:{name}")
    assert raised.value.fix == way_out.format(m=file)


@pytest.mark.parametrize("reference", ["m.py", "m.py:", ":f", "", "m.py:f g"])
def test_what_names_no_function(reference):
    with pytest.raises(UsageError, match="names no function"):
        load_function(reference)


def test_a_function_that_is_not_there_is_told_without_running_the_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("raise SystemExit('it ran')\nfrom os.path import join as joined\n\ndef detector():\n    pass\n")
    with pytest.raises(UsageError, match=r"has no function detectr; did you mean .*mine\.py:detector"):
        check_function(f"{path}:detectr")
    check_function(f"{path}:detector")
    check_function(f"{path}:joined")


@pytest.mark.parametrize(
    "text",
    [
        "from os.path import *",
        "globals()['made'] = print",
        "def __getattr__(name): ...",
        "def broken(:",
        "if 1:\n    made = 2",
    ],
)
def test_what_only_running_can_tell_is_left_to_it(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    check_function(f"{path}:made")
    check_function(f"{tmp_path / 'gone.py'}:made")
    check_function("package.module:made")


def test_arrays_go_through_a_pipe_unchanged():
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array([np.nan, 1], np.float16), "c": np.zeros((0, 2), bool)}
    pipe = io.BytesIO()
    write_arrays(pipe, arrays)
    write_arrays(pipe, {})
    pipe.seek(0)
    found = read_arrays(pipe)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert read_arrays(pipe) == {}
    assert read_arrays(pipe) is None


def test_a_message_cut_short_is_the_end(tmp_path):
    pipe = io.BytesIO()
    write_arrays(pipe, {"a": np.arange(100)})
    for length in (0, 3, 8, 50):
        assert read_arrays(io.BytesIO(pipe.getvalue()[:length])) is None


def test_a_file_that_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "fails_here.py").write_text("import sys\nsys.path.pop(0)\n1 / 0")
    path, modules = list(sys.path), set(sys.modules)
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        load_function(f"{tmp_path / 'fails_here.py'}:f")
    assert sys.path == path
    assert set(sys.modules) == modules
