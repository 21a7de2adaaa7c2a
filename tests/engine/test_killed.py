"""kill -9 at any moment of a build, then the same command again: a correct bundle, and no half files anywhere."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeship.core.artifact import MANIFEST
from edgeship.shipping.bundle import changed_files, read_bundle


def start(order: tuple[object, ...], place: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edgeship.cli.main", "build", *map(str, order)]
    env = {**os.environ, "EDGESHIP_CACHE": str(place / "cache")}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=place, env=env, stdout=quiet, stderr=quiet, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> bool:
    """End the whole group; whether it still ran."""
    ran = process.poll() is None
    if ran:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return ran


def assert_whole_or_absent(output: Path) -> None:
    if output.exists():
        assert (output / MANIFEST).is_file()
        assert changed_files(read_bundle(output)) == []


def assert_clean(place: Path) -> None:
    names = {path.name for path in place.iterdir()}
    assert names == {"out.edgeship", "out.edgeship.log", "cache"}, names
    assert list((place / "cache" / "running").iterdir()) == []
    for entry in (place / "cache" / "steps").iterdir():
        assert (entry / "result.json").is_file()


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.heavy), pytest.param(2, marks=pytest.mark.heavy)]
)
def test_killed_at_random_moments(seed, cli_process, tiny_order, tmp_path):
    """Each turn gets further, because finished steps stay in the cache; the last one runs to its end."""
    chance = random.Random(seed)
    order = (*tiny_order, "-o", "out.edgeship")
    killed = 0
    for _ in range(3):
        process = start(order, tmp_path)
        # Before a first build can have ended, which takes three seconds and more: else there is nothing to kill.
        deadline = time.monotonic() + chance.uniform(0.3, 2.5)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        killed += kill(process)
        assert_whole_or_absent(tmp_path / "out.edgeship")
    assert killed
    ran = cli_process("build", *order, env={"EDGESHIP_CACHE": str(tmp_path / "cache")})
    assert ran.code == 0, ran.err
    assert_clean(tmp_path)
    assert cli_process("verify", "out.edgeship").code == 0


def test_killed_while_the_bundle_is_written(cli, tiny_order, tmp_path):
    """The moments around publishing are short: wait for the draft to appear, then kill at once."""
    order = (*tiny_order, "-o", "out.edgeship")
    env = {"EDGESHIP_CACHE": str(tmp_path / "cache")}
    assert cli("build", *order, env=env).code == 0
    before = (tmp_path / "out.edgeship" / "onnx" / "model.onnx").read_bytes()
    caught = 0
    for turn in range(4):
        if turn == 2:
            shutil.rmtree(tmp_path / "out.edgeship")
        process = start(order, tmp_path)
        while process.poll() is None and not list(tmp_path.glob(".out.edgeship.draft-*")):
            time.sleep(0.0005)
        time.sleep(turn * 0.004)
        kill(process)
        caught += bool(list(tmp_path.glob(".out.edgeship.draft-*")))
        assert_whole_or_absent(tmp_path / "out.edgeship")
    assert caught, "no kill came in time"
    assert cli("build", *order, env=env).code == 0
    assert_clean(tmp_path)
    assert (tmp_path / "out.edgeship" / "onnx" / "model.onnx").read_bytes() == before
    assert cli("verify", "out.edgeship").code == 0


def test_a_stopped_build_says_how_to_go_on(tiny_order, tmp_path):
    command = [sys.executable, "-m", "edgeship.cli.main", "build", *tiny_order, "-o", "out", "--no-cache"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background hands down an ignored SIGINT; a terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    while not (tmp_path / "out.log").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    # A signal that lands inside a library's own import ends the process before Python can speak.
    assert process.returncode in (130, -signal.SIGINT)
    if process.returncode == 130:
        assert "stopped; run the same command again" in err
        assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_two_builds_of_the_same_output_at_once(tiny_order, tmp_path):
    order = (*tiny_order, "-o", "out.edgeship")
    processes = [start(order, tmp_path) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert_clean(tmp_path)
    assert changed_files(read_bundle(tmp_path / "out.edgeship")) == []
