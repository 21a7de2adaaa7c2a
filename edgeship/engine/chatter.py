"""Keep the libraries' own chatter out of the terminal: it goes to a log file beside the bundle."""

from __future__ import annotations

import logging
import os
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import IO, Any

from edgeship.errors import OutputError

# The first line of every log of ours: a file without it is somebody else's.
HEAD = b"edgeship's log; it is written over by the next build of the same name.\n"
# How many names to try when files of others lie where a log should go.
NAMES = 100
CRASH = "crash-"
CRASHES_KEPT = 20
CRASH_DAYS = 30


class Log:
    """The log file of one command. Opened at the first line, so that a refused command leaves nothing behind.

    A file that is there is written over only when it is a log of ours, under this name alone, and no link; else the
    log goes to ``NAME.1.log`` and so on, and `path` says where.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def file(self) -> IO[bytes]:
        """The open file."""
        if self._file is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                for path in _names(self.path):
                    self._file = _own(path)
                    if self._file is not None:
                        self.path = path
                        return self._file
            except OSError as error:
                raise OutputError(
                    f"{self.path} cannot be written: {error.strerror}", fix="choose another -o or EDGESHIP_CACHE"
                ) from None
            raise OutputError(f"{self.path} and {NAMES} more are not logs of edgeship's", fix="choose another -o")
        return self._file

    @property
    def is_open(self) -> bool:
        """Whether something was written to it."""
        return self._file is not None

    def line(self, text: str) -> None:
        """Write one line. A full disk is for the step to report that needs it."""
        self.write(text.encode(errors="replace") + b"\n")

    def write(self, text: bytes) -> None:
        """Write what was said elsewhere, as it is."""
        file = self.file()
        with suppress(OSError):
            file.write(text)

    def close(self) -> None:
        """Close the file; another line opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


class PartLog(Log):
    """The log of one step among several that run at once: a file of its own, which goes into the whole log later.

    Args:
        path: a new file; one without a name when left out.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(path or Path(os.devnull))
        self._named = path is not None

    def file(self) -> IO[bytes]:
        """The open file."""
        if self._file is None:
            if self._named:
                self._file = self.path.open("ab", buffering=0)
                return self._file
            try:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  closed by `close`
            except OSError as error:
                raise OutputError(
                    f"no temporary file can be written: {error.strerror}", fix="set TMPDIR to another folder"
                ) from None
        return self._file

    def taken(self) -> bytes:
        """All that was written; the file is closed."""
        file = self.file()
        file.seek(0)
        text = file.read()
        self.close()
        return text


def _names(path: Path) -> Iterator[Path]:
    yield path
    for number in range(1, NAMES + 1):
        yield path.with_name(f"{path.stem}.{number}{path.suffix}")


def _own(path: Path) -> IO[bytes] | None:
    """A log, open for writing at its end: a new one, or one of ours, emptied unless a command is writing it. None
    where there is something else."""
    flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        try:
            descriptor = os.open(path, flags)
        except OSError:
            return None  # a link, a folder, or nothing that we may read
        found = os.fstat(descriptor)
        ours = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and os.pread(descriptor, len(HEAD), 0) == HEAD
        if not ours and not stat.S_ISCHR(found.st_mode):
            os.close(descriptor)
            return None
        if ours and _is_free(descriptor):
            os.ftruncate(descriptor, 0)
    file = os.fdopen(descriptor, "wb", buffering=0)
    _is_free(descriptor)
    if not os.fstat(descriptor).st_size:
        with suppress(OSError):
            file.write(HEAD)
    return file


def _is_free(descriptor: int) -> bool:
    """Whether no other command writes this log; it is held from then on, until it is closed."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def write_crash(folder: Path, text: str) -> Path:
    """Write what is known of a crash to a log of its own in a folder, and remove old ones there: those that are ours,
    and older than a month or more than twenty. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, old in enumerate(_crashes(folder)):
        if number >= CRASHES_KEPT - 1 or time.time() - old.stat().st_mtime > CRASH_DAYS * 86400:
            old.unlink()
    moment = time.strftime("%Y%m%d-%H%M%S")
    descriptor, name = tempfile.mkstemp(prefix=f"{CRASH}{moment}-", suffix=".log", dir=folder)
    with os.fdopen(descriptor, "wb") as file:
        file.write(HEAD + text.encode(errors="replace"))
    return Path(name)


def _crashes(folder: Path) -> list[Path]:
    """Logs of crashes that are ours, the newest first."""
    found = []
    for path in folder.glob(f"{CRASH}*.log"):
        with suppress(OSError):
            if not path.is_symlink() and path.is_file() and is_log(path):
                found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found, reverse=True)]


def is_log(path: Path) -> bool:
    """Whether a file is a log of ours."""
    with path.open("rb") as file:
        return file.read(len(HEAD)) == HEAD


@contextmanager
def silenced(log: Log) -> Iterator[None]:
    """Send file descriptors 1 and 2, Python's own streams, warnings and logging to the log while a step runs.

    The streams apart from the descriptors: in a notebook they are something else. A log that nothing was written to
    yet is begun only when something is said: a command that is refused leaves no file.
    """
    part = None if log.is_open else PartLog()
    try:
        with _redirected((part or log).file().fileno()):
            yield
    finally:
        text = part.taken() if part is not None else b""
        if text:
            log.write(text)


@contextmanager
def _redirected(target: int) -> Iterator[None]:
    """Send all that is said inside to an open file."""
    _flush()
    saved = os.dup(1), os.dup(2)
    root = logging.getLogger()
    handlers, streams = root.handlers, (sys.stdout, sys.stderr)
    moved: list[tuple[logging.StreamHandler[Any], Any]] = []
    stream = os.fdopen(os.dup(target), "w", encoding="utf-8", errors="replace", buffering=1)
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        with redirect_stdout(stream), redirect_stderr(stream), warnings.catch_warnings():
            root.handlers = [logging.StreamHandler(stream)]
            moved = _move_handlers(streams, stream)
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers = handlers
        for handler, before in moved:
            _set_stream(handler, before)
        # Those that were made meanwhile.
        _move_handlers((stream,), streams[1])
        _flush()
        # On a full disk this fails, and the terminal must come back all the same.
        with suppress(OSError):
            stream.close()
        for number, old in zip((1, 2), saved, strict=True):
            os.dup2(old, number)
            os.close(old)


def _move_handlers(old: Sequence[Any], new: Any) -> list[tuple[logging.StreamHandler[Any], Any]]:
    """Let libraries that log through handlers of their own (torch does) write to another stream; the handlers that were
    moved, each with its stream before."""
    found = []
    loggers = [item for item in logging.root.manager.loggerDict.values() if isinstance(item, logging.Logger)]
    for handler in [handler for logger in loggers for handler in logger.handlers]:
        if isinstance(handler, logging.StreamHandler) and any(handler.stream is stream for stream in old):
            found.append((handler, handler.stream))
            _set_stream(handler, new)
    return found


def _set_stream(handler: logging.StreamHandler[Any], new: Any) -> None:
    try:
        handler.setStream(new)
    except ValueError:  # the old one is closed already, and cannot be flushed
        handler.stream = new


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
