"""Keep the libraries' own chatter out of the terminal: it goes to a log file beside the bundle."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
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
    """Send file descriptors 1 and 2, Python's own streams, warnings and logging to the log while a step runs.

    The streams apart from the descriptors: in a notebook they are something else.
    """
    _flush()
    saved = os.dup(1), os.dup(2)
    root = logging.getLogger()
    handlers = root.handlers
    target = log.file().fileno()
    stream = os.fdopen(os.dup(target), "w", encoding="utf-8", errors="replace", buffering=1)
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        with redirect_stdout(stream), redirect_stderr(stream), warnings.catch_warnings():
            root.handlers = [logging.StreamHandler(stream)]
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers = handlers
        _flush()
        # On a full disk this fails, and the terminal must come back all the same.
        with suppress(OSError):
            stream.close()
        for number, old in zip((1, 2), saved, strict=True):
            os.dup2(old, number)
            os.close(old)


@contextmanager
def hushed() -> Iterator[None]:
    """Drop what libraries write to file descriptor 2 by themselves; Python's ``sys.stderr`` still reaches the terminal.

    For commands that talk while an engine runs, and so cannot send everything to a log.
    """
    _flush()
    saved, stream = os.dup(2), sys.stderr
    try:
        own = stream.fileno() == 2
    except (OSError, ValueError, AttributeError):
        own = False
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    if own:
        sys.stderr = os.fdopen(os.dup(saved), "w", encoding=stream.encoding, errors="replace", buffering=1)
    try:
        yield
    finally:
        _flush()
        if own:
            sys.stderr.close()
        sys.stderr = stream
        os.dup2(saved, 2)
        os.close(saved)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
