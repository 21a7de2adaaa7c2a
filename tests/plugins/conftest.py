"""Packages outside the tree, installed by pip into a folder of the test's own, and commands that find them there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Runs the orders that it is given with what the other tests run commands with.
COMMANDS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from conftest import call_cli
for order in json.loads(sys.stdin.read()):
    ran = call_cli(*order)
    print(json.dumps([ran.code, ran.out, ran.err]), flush=True)
"""


class Said(NamedTuple):
    """What a command said."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """``installed("zipgraph", "locker")``: the environment of a process that has these packages beside edgeship.

    pip builds and installs them as it would from an index, but into a new folder, and without asking one.
    """
    made: dict[tuple[str, ...], dict[str, str]] = {}

    def install(*names: str) -> dict[str, str]:
        if names not in made:
            place = tmp_path_factory.mktemp("site")
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
            offline = ["--no-deps", "--no-build-isolation", "--no-compile", "--no-cache-dir", "--target", str(place)]
            packages = [str(HERE / name) for name in names]
            done = subprocess.run([*pip, *offline, *packages], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            made[names] = {"PYTHONPATH": os.pathsep.join([str(place), str(ROOT)])}
        return made[names]

    return install


@pytest.fixture(scope="session")
def commands() -> Callable[..., list[Said]]:
    """``commands(environment, folder, ["plan", ...], ["build", ...])``: edgeship's commands one after the other, in a
    new process that imports torch once; returns what each said."""

    def run(environment: dict[str, str], folder: Path, *orders: Sequence[object]) -> list[Said]:
        told = json.dumps([[str(item) for item in order] for order in orders])
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS, str(ROOT / "tests")],
            input=told, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [Said(*json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]

    return run
