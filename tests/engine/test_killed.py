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


def start(
    order: tuple[object, ...], place: Path, before: tuple[str, ...] = (), **variables: str
) -> subprocess.Popen[bytes]:
    command = [*before, sys.executable, "-m", "edgeship.cli.main", "build", *map(str, order)]
    env = {**os.environ, "EDGESHIP_CACHE": str(place / "cache"), **variables}
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
    # Killed between making a draft and marking it: an empty folder that nothing proves to be ours, so it stays.
    unmarked = {path for path in place.glob(".out.edgeship.draft-*") if not any(path.iterdir())}
    names = {path.name for path in place.iterdir() if path not in unmarked}
    assert names == {"out.edgeship", "out.edgeship.log", "cache"}, names
    assert list((place / "cache" / "running").iterdir()) == []
    for entry in (place / "cache" / "steps").iterdir():
        assert (entry / "result.json").is_file()


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.heavy), pytest.param(2, marks=pytest.mark.heavy)]
)
def test_killed_at_random_moments(seed, cli, tiny_order, tmp_path):
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
    ran = cli("build", *order, env={"EDGESHIP_CACHE": str(tmp_path / "cache")})
    assert ran.code == 0, ran.err
    assert_clean(tmp_path)
    assert cli("verify", "out.edgeship").code == 0


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


def test_two_builds_of_the_same_output_at_once(cli, tiny_order, tmp_path):
    """One of them here, where the libraries are loaded: it begins when the other one has."""
    order = (*tiny_order, "-o", "out.edgeship")
    other = start(order, tmp_path)
    while not (tmp_path / "cache").exists():
        assert other.poll() is None
        time.sleep(0.01)
    ran = cli("build", *order, env={"EDGESHIP_CACHE": str(tmp_path / "cache")})
    assert (ran.code, other.wait(timeout=300)) == (0, 0), ran.err
    assert_clean(tmp_path)
    assert changed_files(read_bundle(tmp_path / "out.edgeship")) == []


# Process numbers start at 1 in each, as they do in containers that share a disk.
NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


@pytest.fixture
def namespace() -> tuple[str, ...]:
    """What starts a command in a namespace of process numbers of its own."""
    try:
        tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare on this system")
    if tried.returncode:
        pytest.skip(f"no namespace can be made here: {tried.stderr.strip()}")
    return NAMESPACE


def other_source(place: Path) -> tuple[object, ...]:
    """A second model, some of whose steps are those of the tiny one."""
    (place / "other.py").write_text(
        "import torch\ndef model():\n    torch.manual_seed(1)\n    return torch.nn.Linear(8, 4)\n"
    )
    return (f"{place}/other.py:model", "--input", "x:f32[1,8]", "--target", "linux-x86", "--runtime", "onnx")


@pytest.mark.heavy
def test_two_builds_in_two_namespaces_of_processes(namespace, tiny_order, tmp_path):
    """Both with the same process numbers, the same cache and the same output."""
    work = tmp_path / "work"
    work.mkdir()
    processes = [start((*tiny_order, "-o", "out.edgeship"), work, namespace) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert_clean(work)
    assert changed_files(read_bundle(work / "out.edgeship")) == []


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(3))
def test_one_of_two_namespaces_is_killed(namespace, tiny_order, tmp_path, seed):
    chance = random.Random(seed)
    work = tmp_path / "work"
    work.mkdir()
    one, two = (*tiny_order, "-o", "out.edgeship"), (*other_source(tmp_path), "-o", "other")
    for _ in range(3):
        first = start(one, work, namespace)
        second = start(two, work, namespace, EDGESHIP_CACHE_MAX="1")
        time.sleep(chance.uniform(0.5, 6))
        kill(first)
        assert second.wait(timeout=300) == 0
        assert changed_files(read_bundle(work / "other")) == []
        assert_whole_or_absent(work / "out.edgeship")
    assert start(one, work, namespace).wait(timeout=300) == 0
    assert changed_files(read_bundle(work / "out.edgeship")) == []
    assert not [path for path in work.iterdir() if path.name.startswith(".other")]
    assert list((work / "cache" / "running").iterdir()) == []


@pytest.mark.heavy
def test_eviction_beside_a_build(tiny_order, tmp_path):
    """Builds with no room in the cache, side by side: each sweeps away what it can, and none what another uses."""
    work = tmp_path / "work"
    work.mkdir()
    long = start((*tiny_order, "-o", "long"), work, EDGESHIP_CACHE_MAX="1")
    beside = []
    while long.poll() is None:
        # The sweep of a build that ends before it loads anything.
        absent = start(
            ("absent.onnx", "--target", "linux-x86", "-o", f"short{len(beside)}"), work, EDGESHIP_CACHE_MAX="1"
        )
        beside.append(absent.wait(timeout=300))
    assert long.returncode == 0
    assert set(beside) == {3}
    assert changed_files(read_bundle(work / "long")) == []


@pytest.mark.heavy
def test_two_builds_with_no_room_in_the_cache(tiny_order, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    orders = [(*tiny_order, "-o", "long"), (*other_source(tmp_path), "-o", "other")]
    processes = [start(order, work, EDGESHIP_CACHE_MAX="1") for order in orders]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    for name in ("long", "other"):
        assert changed_files(read_bundle(work / name)) == []
    assert list((work / "cache" / "running").iterdir()) == []
