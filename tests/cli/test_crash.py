"""A bug in edgeship is told in one line, and its traceback lies beside the other logs."""

import os
import re
from pathlib import Path

import pytest

from edgeship import api
from edgeship.engine.chatter import HEAD


@pytest.fixture
def crash(cli, monkeypatch, tiny_order, tmp_path):
    """``edgeship build`` with a bug; returns what it said and the file that it names."""

    def run(**env: str):
        def broken(*arguments, **named):
            raise ZeroDivisionError("a bug\nof ours")

        monkeypatch.setattr(api, "run", broken)
        ran = cli("build", *tiny_order, "-o", "out", env=env)
        assert ran.code == 70
        assert len(ran.errors) == 1
        assert "a bug in edgeship: ZeroDivisionError: a bug of ours; see " in ran.errors[0]
        return Path(re.search(r"see (\S+)", ran.errors[0])[1])

    return run


def test_the_log_of_a_crash_lies_beside_the_other_logs(crash, tmp_path):
    for number in range(1, 4):
        path = crash(EDGESHIP_CACHE=str(tmp_path / "cache"))
        assert path.parent == tmp_path / "cache" / "logs"
        assert path.read_bytes().startswith(HEAD)
        assert "ZeroDivisionError: a bug" in path.read_text()
        assert len(list(path.parent.iterdir())) == number
    assert not list(tmp_path.glob("*crash*"))


def test_old_ones_go_after_a_month(crash, tmp_path):
    old = [crash(EDGESHIP_CACHE=str(tmp_path / "cache")) for _ in range(2)]
    os.utime(old[0], (0, 0))
    crash(EDGESHIP_CACHE=str(tmp_path / "cache"))
    assert not old[0].exists()
    assert old[1].exists()


def test_where_no_log_can_be_written_there_it_goes_among_temporary_files(crash, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "file").write_text("")
    path = crash(EDGESHIP_CACHE=str(tmp_path / "file"))
    assert path.parent == tmp_path / "temporary"


def test_a_users_log_is_not_touched(cli, tiny_order, tmp_path):
    (tmp_path / "out.log").write_text("mine")
    (tmp_path / "notes").write_text("mine too")
    (tmp_path / "out.1.log").symlink_to("notes")
    ran = cli("build", *tiny_order, "-o", "out")
    assert ran.code == 0, ran.err
    assert (tmp_path / "out.log").read_text() == "mine"
    assert (tmp_path / "notes").read_text() == "mine too"
    assert (tmp_path / "out.2.log").read_bytes().startswith(HEAD)
    assert "log: out.2.log" in ran.out.replace("\n", " ")
