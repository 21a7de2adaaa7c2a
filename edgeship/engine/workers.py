"""Worker processes: start one, have it run a pass, and say in one line how it ended where it did not answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from edgeship.core.model import Model
from edgeship.core.plan import Step
from edgeship.core.registry import passes, runtimes
from edgeship.engine.calls import Answer, Call, Said, Warm
from edgeship.errors import LimitError, LoweringError

# Libraries for arithmetic and the variables that say how many threads each uses.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "RAYON_NUM_THREADS")
# Names in the folder of a running step, beside the one that the pass writes to.
LOG, TEMPORARY = "log", "temporary"


class Worker:
    """A child process that runs one pass at a time. It is started at the first use, and again after it has died.

    Args:
        threads: how many threads its libraries use.

    Attributes:
        runtimes: those whose libraries it has imported ahead.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._calls: Connection | None = None
        self._life = -1
        self._stopped = False
        self.runtimes: tuple[str, ...] = ()

    def warm(self, runtimes: Sequence[str]) -> None:
        """Have it import what lowers for some runtimes, without waiting for it."""
        self.runtimes = tuple(runtimes)
        with suppress(OSError):
            self._connection().send(Warm(_modules(runtimes)))

    def run(
        self,
        step: Step,
        inputs: Mapping[str, Model],
        folder: Path,
        shared: Path | None,
        hear: Callable[[str, tuple[Any, ...]], None],
    ) -> Answer:
        """Run a step's pass.

        Args:
            folder: an empty folder for what it writes; its log and temporary files go beside it.
            shared: a folder for what steps leave for each other.
            hear: called with what the pass tells (`calls.Said`).

        Raises:
            LimitError: the process was killed, most likely for want of memory.
            LoweringError: it crashed.
        """
        connection = self._connection()
        try:
            connection.send(Call(step.task, inputs, folder, folder.parent / LOG, folder.parent / TEMPORARY, shared))
            while True:
                heard = connection.recv()
                if isinstance(heard, Answer):
                    return heard
                if isinstance(heard, Said):
                    hear(heard.function, heard.values)
        except (EOFError, OSError):
            raise _ended(step, self._wait()) from None

    def stop(self) -> None:
        """End the process and all that it started, at once and for good."""
        self._stopped = True
        process = self._process
        if process is not None:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)

    def renew(self) -> None:
        """After `stop`, once nobody waits for its answer: the next step starts another process."""
        if self._stopped:
            self._wait()
            self._stopped = False

    def close(self) -> None:
        """Stop, and wait until it is gone."""
        self.stop()
        self._wait()

    def _connection(self) -> Connection:
        if self._calls is None:
            ours, theirs = Pipe()
            life, self._life = os.pipe()
            command = [sys.executable, "-m", "edgeship.engine.worker", str(theirs.fileno()), str(life)]
            try:
                self._process = subprocess.Popen(
                    command, env=self._environment(), pass_fds=(theirs.fileno(), life), stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
            finally:
                theirs.close()
                os.close(life)
            self._calls = ours
            if self._stopped:
                self.stop()
        return self._calls

    def _environment(self) -> dict[str, str]:
        from edgeship.lowering.qnn.compiler import child_environment

        own = {name: str(_at_most(self._threads, os.environ.get(name))) for name in THREADS}
        return {**child_environment(), **own}

    def _wait(self) -> int:
        """Its exit code, once it has ended; it can then be started again."""
        process, self._process = self._process, None
        connection, self._calls = self._calls, None
        life, self._life = self._life, -1
        if connection is not None:
            connection.close()
        if life >= 0:
            os.close(life)
        return process.wait() if process is not None else 0


def _at_most(threads: int, said: str | None) -> int:
    return min(threads, int(said)) if said is not None and said.isdecimal() and int(said) else threads


def _ended(step: Step, code: int) -> LimitError | LoweringError:
    if code == -signal.SIGKILL:
        return LimitError(
            f"{step.name}: its process was killed, most likely because memory ran out",
            fix="close other programs, or give --jobs 1",
        )
    how = f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
    return LoweringError(f"{step.name}: its process {how}", fix="see the log file")


def _modules(names: Sequence[str]) -> tuple[str, ...]:
    """What the passes import that lower for some runtimes, by the distributions whose versions decide their results."""
    kinds = [kind for name in names for kind in (runtimes()[name].artifact, *runtimes()[name].through)]
    tools = [tool for cls in passes().values() if cls.edges()[1] in kinds for tool in cls.tools]
    return tuple(dict.fromkeys(tool.replace("-", "_") for tool in tools))


class Crew:
    """The workers of one build, ended with it.

    Args:
        size: how many at most. cores: what they share.
    """

    def __init__(self, size: int, cores: int) -> None:
        self.workers = [Worker(max(1, cores // size)) for _ in range(size)]

    def warm(self, names: Sequence[str]) -> None:
        """Begin to import what lowers for these runtimes, each in one of the workers, while the model is loaded."""
        for number, worker in enumerate(self.workers):
            # What comes last has the longest way: Hexagon's begins with another artifact.
            worker.warm(names[::-1][number :: len(self.workers)])

    def keep(self, size: int) -> list[Worker]:
        """The workers that are left when no more than ``size`` are wanted: none where that is one."""
        kept = self.workers[:size] if size > 1 else []
        self._end(self.workers[len(kept) :])
        self.workers = kept
        return kept

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        self._end(self.workers)

    @staticmethod
    def _end(workers: Sequence[Worker]) -> None:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.close()
