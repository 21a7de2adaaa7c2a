"""A compiled model in the HTP emulator, in a child process: the library prints, and may crash there without harm."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.data.frames import read_arrays, write_arrays
from edgeship.errors import ArtifactError

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeship.core.runtimes import Arrays

# The worker program. Named, not imported: it belongs to another process.
WORKER = "edgeship.lowering.qnn.worker"
TIMEOUT_S = 600.0


def worker_command(action: str, job: dict[str, Any]) -> list[str]:
    """The command line of the worker for one action."""
    return [sys.executable, "-m", WORKER, action, json.dumps(job)]


def worker_environment() -> dict[str, str]:
    """The environment for a child that imports the same edgeship as this process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


class Emulator:
    """One child for the life of a session.

    Args:
        model: the EPContext model. chip: fields of the worker's ``Hexagon``.

    Raises:
        ArtifactError: the context does not load.
    """

    def __init__(self, model: Path, chip: dict[str, Any]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the child
        self._child = subprocess.Popen(
            worker_command("serve", {"model": model.name, "chip": chip}),
            cwd=model.parent,
            env=worker_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        if self._answer() is None:
            reason = self._last_line()
            self.close()
            raise ArtifactError(f"{model} does not load in the HTP emulator: {reason}", fix="build again")

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run once. Raises `ArtifactError` when the emulator fails, crashes or hangs. Shapes are the signature's."""
        assert self._child.stdin is not None
        try:
            write_arrays(self._child.stdin, inputs)
            results = self._answer()
        except BrokenPipeError:
            results = None
        if results is None:
            raise ArtifactError(f"the HTP emulator crashed: {self._last_line()}", fix="build again")
        if "!error" in results:
            reason = " ".join(str(results["!error"]).split())[:300]
            raise ArtifactError(f"the HTP emulator failed: {reason}", fix="build again")
        return results

    def close(self) -> None:
        """End the child."""
        if self._child.stdin is not None:
            # What a dead child did not read is still in the buffer, and closing flushes.
            with suppress(BrokenPipeError):
                self._child.stdin.close()
        try:
            self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()
        self._log.close()

    def _answer(self) -> dict[str, npt.NDArray[Any]] | None:
        """The next frame; None when the child died, or was ended because it took too long."""
        assert self._child.stdout is not None
        timer = threading.Timer(TIMEOUT_S, self._child.kill)
        timer.start()
        try:
            return read_arrays(self._child.stdout)
        finally:
            timer.cancel()

    def _last_line(self) -> str:
        self._log.seek(0)
        return last_line(self._log.read().decode(errors="replace"))


def last_line(printed: str) -> str:
    """The last line that a process printed, without colours."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", printed).splitlines()
    return next((" ".join(line.split())[:300] for line in reversed(lines) if line.strip()), "no message")
