"""What libraries print goes to the log, and the terminal comes back whatever happens."""

import io
import logging
import os
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

from edgeship.engine import chatter
from edgeship.engine.chatter import HEAD, Log, silenced, write_crash
from edgeship.errors import OutputError


def test_every_way_to_print_goes_to_the_log(tmp_path, capfd):
    log = Log(tmp_path / "x.log")
    print("before")
    with silenced(log):
        print("from print")
        sys.stderr.write("from stderr\n")
        os.write(1, b"from descriptor 1\n")
        os.write(2, b"from descriptor 2\n")
        subprocess.run(["echo", "from a child"], check=True)
        warnings.warn("from a warning", stacklevel=1)
        logging.getLogger("library").error("from logging")
    print("after")
    out, err = capfd.readouterr()
    assert (out, err) == ("before\nafter\n", "")
    text = (tmp_path / "x.log").read_text()
    for line in ("print", "stderr", "descriptor 1", "descriptor 2", "a child", "logging"):
        assert f"from {line}" in text
    assert "from a warning" not in text


def test_the_terminal_comes_back_after_an_error(tmp_path, capfd):
    with pytest.raises(ValueError, match="no"), silenced(Log(tmp_path / "x.log")):
        raise ValueError("no")
    print("after")
    assert capfd.readouterr().out == "after\n"


def test_handlers_come_back(tmp_path):
    before = list(logging.getLogger().handlers)
    with silenced(Log(tmp_path / "x.log")):
        assert logging.getLogger().handlers != before
    assert logging.getLogger().handlers == before


def test_a_log_that_nothing_was_written_to_is_no_file(tmp_path):
    Log(tmp_path / "x.log")
    assert not (tmp_path / "x.log").exists()


def test_a_log_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Log(tmp_path / "file" / "x.log").line("text")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_does_not_keep_the_terminal(capfd):
    log = Log(Path("/dev/full"))
    log.line("does not fit")
    with silenced(log), suppress(OSError):
        print("lost")
    print("after")
    assert capfd.readouterr().out == "after\n"


THEIRS = b"my own notes\n"


def foreign_file(place: Path, other: Path) -> None:
    place.write_bytes(THEIRS)


def link(place: Path, other: Path) -> None:
    place.symlink_to(other)


def dangling_link(place: Path, other: Path) -> None:
    place.symlink_to(other.with_name("absent"))


def hard_link(place: Path, other: Path) -> None:
    os.link(other, place)


def link_to_a_log(place: Path, other: Path) -> None:
    write_log(other)
    place.symlink_to(other)


def hard_link_to_a_log(place: Path, other: Path) -> None:
    write_log(other)
    os.link(other, place)


def folder(place: Path, other: Path) -> None:
    place.mkdir()
    (place / "file").write_bytes(THEIRS)


def pipe(place: Path, other: Path) -> None:
    os.mkfifo(place)


def half_a_head(place: Path, other: Path) -> None:
    place.write_bytes(HEAD[:-1])


def write_log(path: Path) -> None:
    path.unlink(missing_ok=True)
    Log(path).line("kept by the user")


@pytest.mark.parametrize(
    "prepare",
    [foreign_file, link, dangling_link, hard_link, link_to_a_log, hard_link_to_a_log, folder, pipe, half_a_head],
)
def test_a_log_goes_beside_what_is_not_ours(tmp_path, prepare):
    place, other = tmp_path / "out.log", tmp_path / "other"
    other.write_bytes(THEIRS)
    prepare(place, other)
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for _ in range(2):
        log = Log(place)
        log.line("text")
        assert log.path.name == "out.1.log"
        assert log.path.read_bytes() == HEAD + b"text\n"
    after = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == {**before, "out.1.log": HEAD + b"text\n"}
    assert not (tmp_path / "absent").exists()


def test_the_log_of_the_last_build_is_written_over(tmp_path):
    for text in ("one", "two"):
        log = Log(tmp_path / "out.log")
        log.line(text)
        log.file().close()
    assert (tmp_path / "out.log").read_bytes() == HEAD + b"two\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.log"]


def test_two_commands_share_a_log(tmp_path):
    first, second = Log(tmp_path / "out.log"), Log(tmp_path / "out.log")
    first.line("one")
    second.line("two")
    first.line("three")
    assert (tmp_path / "out.log").read_bytes() == HEAD + b"one\ntwo\nthree\n"


def test_where_every_name_is_taken_there_is_no_log(tmp_path, monkeypatch):
    monkeypatch.setattr(chatter, "NAMES", 2)
    for name in ("out.log", "out.1.log", "out.2.log"):
        (tmp_path / name).write_bytes(THEIRS)
    with pytest.raises(OutputError, match="are not logs of edgeship's"):
        Log(tmp_path / "out.log").line("text")
    assert all(path.read_bytes() == THEIRS for path in tmp_path.iterdir())


def test_old_crashes_go_and_files_of_others_stay(tmp_path):
    for number in range(30):
        path = write_crash(tmp_path, f"crash {number}")
        os.utime(path, (time.time() - 1000 + number,) * 2)
    left = sorted(path.read_text().rpartition(" ")[2] for path in tmp_path.iterdir())
    assert left == sorted(str(number) for number in range(10, 30))
    for path in sorted(tmp_path.iterdir())[:5]:
        os.utime(path, (time.time() - 31 * 86400,) * 2)
    (tmp_path / "crash-mine.log").write_bytes(THEIRS)
    (tmp_path / "other.log").write_bytes(HEAD)
    (tmp_path / "crash-link.log").symlink_to(tmp_path / "other.log")
    for path in tmp_path.iterdir():
        if path.name in ("crash-mine.log", "other.log"):
            os.utime(path, (0, 0))
    write_crash(tmp_path, "the last")
    assert len(list(tmp_path.glob("crash-2*"))) == 16
    assert (tmp_path / "crash-mine.log").read_bytes() == THEIRS
    assert (tmp_path / "other.log").read_bytes() == HEAD
    assert (tmp_path / "crash-link.log").is_symlink()


def test_silence_begins_no_log_until_something_is_said(tmp_path):
    log = Log(tmp_path / "x.log")
    with silenced(log):
        pass
    with pytest.raises(ValueError, match="refused"), silenced(log):
        raise ValueError("refused")
    assert not (tmp_path / "x.log").exists()
    with silenced(log):
        print("said")
    assert (tmp_path / "x.log").read_bytes() == HEAD + b"said\n"


def test_libraries_with_handlers_of_their_own_go_to_the_log_too(tmp_path, monkeypatch):
    """As in a notebook, where Python's streams are not descriptors 1 and 2, and a library keeps the one it found."""
    notebook = io.StringIO()
    monkeypatch.setattr(sys, "stderr", notebook)
    loud = logging.getLogger("library_with_a_handler")
    handler = logging.StreamHandler()
    loud.addHandler(handler)
    loud.propagate = False
    elsewhere = logging.StreamHandler(io.StringIO())
    loud.addHandler(elsewhere)
    try:
        with silenced(Log(tmp_path / "x.log")):
            loud.error("inside")
            later = logging.StreamHandler()
            loud.addHandler(later)
        assert handler.stream is later.stream is notebook
        loud.removeHandler(later)
        loud.error("outside")
    finally:
        loud.handlers.clear()
    assert notebook.getvalue() == "outside\n"
    assert elsewhere.stream.getvalue() == "inside\noutside\n"
    assert "inside" in (tmp_path / "x.log").read_text()


def test_a_handler_that_cannot_be_flushed_stops_nothing(tmp_path):
    """One of absl's keeps the flush of the stream that it was made with."""
    closed = io.StringIO()
    handler = logging.StreamHandler(sys.stderr)
    handler.flush = closed.flush
    closed.close()
    loud = logging.getLogger("library_that_cannot_flush")
    loud.addHandler(handler)
    try:
        with silenced(Log(tmp_path / "x.log")):
            assert handler.stream is sys.stderr
        assert handler.stream is sys.stderr
    finally:
        loud.handlers.clear()


def test_where_nothing_temporary_can_be_written_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(chatter.tempfile, "tempdir", str(tmp_path / "gone"))
    with (
        pytest.raises(OutputError, match=r"no temporary file can be written: .*; set TMPDIR"),
        silenced(Log(tmp_path / "x")),
    ):
        raise AssertionError
    print("the terminal is there")
