"""Keep the libraries' own chatter out of the terminal: it goes to a log file beside the bundle."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from edgeship.errors import OutputError


class Log:
    """The log file of one command. Opened at the first line, so that a refused command leaves nothing behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def file(self) -> IO[bytes]:
        """The open file."""
        if self._file is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("wb", buffering=0)
            except OSError as error:
                raise OutputError(
                    f"{self.path} cannot be written: {error.strerror}", fix="choose another -o or EDGESHIP_CACHE"
                ) from None
        return self._file

    def line(self, text: str) -> None:
        """Write one line. A full disk is for the step to report that needs it."""
        file = self.file()
        with suppress(OSError):
            file.write(text.encode(errors="replace") + b"\n")


@contextmanager
def silenced(log: Log) -> Iterator[None]:
    """Send file descriptors 1 and 2, Python warnings and logging to the log while a step runs."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    target = log.file().fileno()
    root = logging.getLogger()
    handler = logging.StreamHandler(sys.stderr)
    handlers, root.handlers = root.handlers, [handler]
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        # On a full disk these fail, and the terminal must come back all the same.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        root.handlers = handlers
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        os.close(saved[0])
        os.close(saved[1])
