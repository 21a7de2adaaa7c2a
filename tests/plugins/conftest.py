"""Packages outside the tree, installed by pip into a folder of the test's own, and commands that find them there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """``installed("zipgraph", "locker")``: the environment of a process that has these packages beside edgeship.

    pip builds and installs them, as it would from an index, but into a new folder and without asking one.
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
