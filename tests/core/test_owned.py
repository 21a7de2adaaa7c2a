"""A folder is removed only with our marker in it and while nobody holds it; locks end with their process."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.core import owned
from edgeship.core.owned import LINE, MARKER, alone_in, claim, clear, hold, is_ours, make, remove
from edgeship.errors import OutputError


def holder(folder: Path, alone: bool) -> subprocess.Popen[str]:
    """A process that holds a folder until it is killed."""
    code = f"""
        import sys, time
        from pathlib import Path
        from edgeship.core.owned import hold
        held = hold(Path({str(folder)!r}), alone={alone})
        print(held is not None, flush=True)
        time.sleep(100)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def test_what_is_made_is_ours_until_it_is_removed(tmp_path):
    folder, held = make(tmp_path, "x-")
    assert is_ours(folder)
    assert not remove(folder)
    held.release()
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text("ours")
    assert remove(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alone", [True, False])
def test_a_lock_of_another_process_holds_until_it_is_killed(tmp_path, alone):
    folder, held = make(tmp_path, "x-")
    held.release()
    process = holder(folder, alone)
    try:
        assert not remove(folder)
        assert (hold(folder, alone=False) is None) == alone
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert remove(folder)


@given(content=st.binary(max_size=100).filter(lambda content: content != LINE))
def test_no_other_content_of_a_marker_proves_anything(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("folder")
    (folder / MARKER).write_bytes(content)
    (folder / "file").write_text("theirs")
    assert not is_ours(folder)
    assert hold(folder, alone=True) is None
    assert not remove(folder)
    assert (folder / "file").read_text() == "theirs"


def test_a_link_to_a_folder_of_ours_is_none(tmp_path):
    folder, held = make(tmp_path, "x-")
    held.release()
    (tmp_path / "link").symlink_to(folder)
    assert not is_ours(tmp_path / "link")
    assert not remove(tmp_path / "link")
    other = tmp_path / "other"
    other.mkdir()
    (other / MARKER).symlink_to(folder / MARKER)
    assert not is_ours(other)
    assert not remove(other)


def test_what_links_lead_to_stays(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").write_text("theirs")
    folder, held = make(tmp_path, "x-")
    (folder / "to_folder").symlink_to(theirs)
    (folder / "to_file").symlink_to(theirs / "file")
    os.link(theirs / "file", folder / "hard")
    assert clear(folder)
    held.release()
    assert (theirs / "file").read_text() == "theirs"


def test_a_disk_mounted_inside_stays(tmp_path):
    folder, held = make(tmp_path, "x-")
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", str(disk)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        (disk / "file").write_text("theirs")
        (folder / "ours").write_text("ours")
        assert not clear(folder)
        held.release()
        assert (disk / "file").read_text() == "theirs"
        assert not (folder / "ours").exists()
        assert is_ours(folder)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert remove(folder)


def test_a_folder_is_claimed_once(tmp_path):
    claim(tmp_path, alone=False)
    with pytest.raises(FileExistsError):
        claim(tmp_path, alone=False)


def test_who_waits_too_long_for_a_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(owned, "WAIT_SECONDS", 0.1)
    with alone_in(tmp_path), pytest.raises(OutputError, match=r"keeps .* locked"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass
