"""What libraries print goes to the log, and the terminal comes back whatever happens."""

import logging
import os
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

from edgeship.engine.chatter import Log, silenced
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
