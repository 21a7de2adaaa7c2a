"""What differs between Linux and macOS, with the other system's answers put in place of this one's.

``make lint`` also lets mypy read the whole package as on macOS, where what Linux alone has does not exist.
"""

import errno
import json
import os
import resource
import subprocess
import sys
from contextlib import closing
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from edgeship.api.orders import BuildOrder
from edgeship.api.preparing import _adapters as named_adapters
from edgeship.api.preparing import prepare
from edgeship.compression import forecast
from edgeship.core import owned, runtimes
from edgeship.devices import host
from edgeship.engine import gathering
from edgeship.engine.cache import Cache
from edgeship.engine.chatter import Log
from edgeship.engine.executor import Silence
from edgeship.errors import UsageError
from edgeship.shipping import swap


@pytest.fixture
def mac(monkeypatch, tmp_path):
    """No /proc, and Python says darwin."""

    def elsewhere(name):
        return tmp_path / "none" if str(name).startswith("/proc") else Path(name)

    for module in (host, gathering):
        monkeypatch.setattr(module, "Path", elsewhere)
    monkeypatch.setattr(sys, "platform", "darwin")


def test_peak_memory_is_in_bytes_on_both(mac, monkeypatch):
    usage = resource.getrusage(resource.RUSAGE_SELF)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    assert host._peak_bytes() == usage.ru_maxrss
    monkeypatch.setattr(sys, "platform", "freebsd14")
    assert host._peak_bytes() == usage.ru_maxrss * 1024


def test_peak_memory_here_is_what_the_process_had():
    now = psutil.Process().memory_info().rss
    assert 0.9 * now <= host._peak_bytes() <= psutil.virtual_memory().total


def test_memory_now_needs_no_proc(monkeypatch):
    before = forecast._resident()
    held = b"1" * 200_000_000
    assert 190_000_000 <= forecast._resident() - before <= 400_000_000
    assert len(held) == 200_000_000


def test_a_mac_names_its_chip(mac, monkeypatch, tmp_path):
    program = tmp_path / "sysctl"
    program.write_text('#!/bin/sh\ntest "$*" = "-n machdep.cpu.brand_string" && echo "Apple M9 Max"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gathering.machine()["processor"] == "Apple M9 Max"
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gathering.machine()["processor"]


def test_the_new_folder_takes_the_old_ones_place_where_names_cannot_be_exchanged(mac, tmp_path):
    ready, final, aside = (tmp_path / name for name in ("ready", "final", "aside"))
    for place in (ready, final):
        place.mkdir()
        (place / "name").write_text(place.name)
    seen = []
    swap.put_in_place(ready, final, aside, lambda old: seen.append((old / "name").read_text()))
    assert seen == ["final"]
    assert (final / "name").read_text() == "ready"
    assert (aside / "name").read_text() == "final"
    assert not ready.exists()


@pytest.mark.parametrize("error", [errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_disk_without_locks_is_used_and_nothing_on_it_removed(monkeypatch, tmp_path, error):
    """Shared folders of a Mac, and some of a network, know no flock."""

    def refuse(descriptor, flags):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(owned.fcntl, "flock", refuse)
    folder, held = owned.make(tmp_path, "draft-")
    try:
        assert owned.is_ours(folder)
        assert not owned.remove(folder)
        with owned.alone_in(tmp_path):
            pass
    finally:
        held.release()
    assert folder.is_dir()


@pytest.fixture
def without_qnn(monkeypatch):
    """As where onnxruntime-qnn is neither there nor published."""
    real = metadata.version

    def version(name):
        if name == "onnxruntime-qnn":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    reason = "onnxruntime-qnn is not published for macOS arm64"
    monkeypatch.setattr(runtimes, "not_offered", lambda name: reason if name == "onnxruntime-qnn" else "")
    return reason


def test_what_this_system_cannot_have_is_left_out_and_said(cli, tiny_source, without_qnn, tmp_path):
    order = (tiny_source, "--input", "image:f32[1,1,4,4]", "--target", "galaxy-s24")
    plan = json.loads(cli("plan", *order, "--json").out)
    assert plan["skipped"]["runtime qnn"] == without_qnn
    assert {runtime for step in plan["steps"] for _, runtime in step["routes"]} == {"onnx", "tflite"}
    assert f"runtime qnn                skipped: {without_qnn}" in cli("plan", *order).out
    asked = BuildOrder(tiny_source, inputs=("image:f32[1,1,4,4]",), targets=("galaxy-s24",))
    with closing(Cache(tmp_path / "cache")) as cache:
        prepared = prepare(asked, cache, Log(tmp_path / "log"), Silence())
    assert prepared.remarks == (f"qnn is left out: {without_qnn}",)


def test_a_runtime_that_was_asked_for_is_not_left_out(cli, tiny_source, without_qnn):
    order = (tiny_source, "--input", "image:f32[1,1,4,4]", "--target", "galaxy-s24", "--runtime")
    said = f"QNN (Hexagon) does not work here: {without_qnn}; name other runtimes with --runtime"
    alone = cli("plan", *order, "qnn")
    assert alone.code == 6
    assert alone.errors == [f"error: {said}"]
    assert said in cli("plan", *order, "qnn,onnx").out


@pytest.mark.parametrize("other", ["style", "Style", "STYLE"])
def test_adapters_are_not_told_apart_by_capitals(tmp_path, other):
    """Their files have their names, and a disk of a Mac takes both for one file."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        named_adapters([f"style={tmp_path}", f"{other}={tmp_path}"])
    assert caught.value.what == f"two adapters are called {other}"
    assert len(named_adapters([f"style={tmp_path}", f"styles={tmp_path}"])) == 2


def newest(folder: Path, root: Path) -> str:
    """What the Makefile's script finds with a path of this folder alone."""
    script = root / "scripts" / "newest_python.sh"
    done = subprocess.run(["/bin/sh", script], env={"PATH": str(folder)}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_newest_python_that_runs_is_taken(tmp_path, root):
    def fake(name: str, answer: int) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {answer}\n")
        (tmp_path / name).chmod(0o755)

    assert newest(tmp_path, root) == ""
    fake("python3.14", 0)
    fake("python3", 1)  # of another version, or without venv
    assert newest(tmp_path, root) == ""
    (tmp_path / "python3").unlink()
    (tmp_path / "python3").symlink_to(sys.executable)
    assert newest(tmp_path, root) == "python3"
    fake("python3.11", 0)
    fake("python3.13", 127)  # a version manager's name for what is not chosen
    assert newest(tmp_path, root) == "python3.11"
    fake("python3.12", 0)
    assert newest(tmp_path, root) == "python3.12"


def test_make_without_a_python_says_what_it_needs(tmp_path, root):
    command = ["make", "-s", "setup", "PYTHON=", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "edgeship needs Python 3.11, 3.12 or 3.13" in done.stderr
    assert not (tmp_path / "venv").exists()
