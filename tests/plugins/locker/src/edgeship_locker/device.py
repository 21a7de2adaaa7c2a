"""The device: copies an artifact to where it runs, starts the agent there, and takes its figures back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from edgeship.core.device import Device, Shipped
from edgeship.core.records import to_plain
from edgeship.core.registry import runtimes
from edgeship.core.report import Measurement
from edgeship.errors import ArtifactError, UsageError

TIMEOUT_SECONDS = 600


class Locker(Device):
    """A folder that stands for a phone."""

    name: ClassVar[str] = "locker"
    argument: ClassVar[str] = "FOLDER"
    summary: ClassVar[str] = "a folder that stands for a phone: artifacts are copied there and run by an agent"

    def measure(self, shipped: Shipped, argument: str, seconds: float) -> tuple[Measurement, ...]:
        """The median of some runs, as the agent reports it.

        Raises:
            UsageError: there is no such folder. ArtifactError: the artifact does not run there.
        """
        runtime, place = runtimes()[shipped.artifact.runtime], Path(argument)
        if not place.is_dir():
            raise UsageError(f"{argument} is not a folder", fix=f"write {self.name}:FOLDER")
        figure = Measurement("latency_p50", None, "ms", "reported", device=argument, runtime=runtime.name)
        if runtime.engine.untimed or runtime.engine.for_language:
            return (replace(figure, note=runtime.engine.untimed or "the agent runs networks only"),)
        with tempfile.TemporaryDirectory(dir=place) as folder:
            found = self._ask(shipped, Path(folder), seconds)
        return (replace(figure, value=found["median_ms"], runs=found["runs"], versions=runtime.versions()),)

    def _ask(self, shipped: Shipped, folder: Path, seconds: float) -> dict[str, float]:
        """What the agent says of an artifact in a folder of its own; nothing stays there."""
        copied = folder / shipped.artifact.path.name
        copy = shutil.copytree if shipped.artifact.path.is_dir() else shutil.copyfile
        copy(shipped.artifact.path, copied)
        order = {"artifact": to_plain(replace(shipped.artifact, path=copied)), "seconds": seconds}
        agent = [sys.executable, "-m", "edgeship_locker.agent"]
        done = subprocess.run(
            agent, input=json.dumps(order), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
        lines = done.stdout.splitlines()
        if done.returncode or not lines:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise ArtifactError(f"{copied.name} does not run in {folder.parent}: {said}", fix="build it again")
        found: dict[str, float] = json.loads(lines[-1])
        return found


DEVICE = Locker()
