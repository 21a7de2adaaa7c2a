"""What proves that a folder is ours, and whether anybody uses it.

A folder that edgeship makes for itself (a draft of a bundle, a running step, an entry of the cache) holds a file
``.edgeship`` with `LINE`. Nothing is removed without it. Whoever uses the folder keeps a lock (``flock``) on that file:
the kernel frees it when the process ends, however it ends, and it holds between containers that share a disk, where
process numbers mean nothing.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeship.errors import OutputError

try:
    import fcntl
except ImportError:  # a system without flock: nothing can be proved unused there, and nothing is removed
    fcntl = None  # type: ignore[assignment]

MARKER = ".edgeship"
LINE = b"edgeship made this folder, and removes it when no build uses it.\n"
# How long to wait for another process that looks at the same folder.
WAIT_SECONDS = 120.0
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class Hold:
    """A lock on a folder of ours, until it is released or the process ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Let others have it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.release()


def claim(folder: Path, *, alone: bool) -> Hold:
    """Mark a folder that we made as ours, and hold it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(folder / MARKER, flags, 0o644)
    try:
        os.write(descriptor, LINE)
        _lock(descriptor, alone=alone)
    except OSError:
        os.close(descriptor)
        raise
    return Hold(descriptor)


def make(parent: Path, prefix: str) -> tuple[Path, Hold]:
    """A new folder of ours, held alone. Its name starts with ``prefix``."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        return folder, claim(folder, alone=True)
    except OSError:
        with suppress(OSError):
            (folder / MARKER).unlink(missing_ok=True)
            folder.rmdir()
        raise


def is_ours(folder: Path) -> bool:
    """Whether the folder itself (and not what a link leads to) holds our marker."""
    descriptor = _opened(folder)
    if descriptor is None:
        return False
    os.close(descriptor)
    return True


def hold(folder: Path, *, alone: bool) -> Hold | None:
    """Hold a folder of ours. None when it is not ours, is not there, or others hold it."""
    descriptor = _opened(folder)
    if descriptor is None:
        return None
    # Between opening and locking, whoever held it may have removed it, and another may stand in its place.
    if _lock(descriptor, alone=alone) and _same(descriptor, folder / MARKER):
        return Hold(descriptor)
    os.close(descriptor)
    return None


def remove(folder: Path) -> bool:
    """Remove a folder of ours with all that is in it, if nobody holds it; the marker goes last. Whether it is gone."""
    held = hold(folder, alone=True)
    if held is None:
        return False
    try:
        return clear(folder)
    finally:
        held.release()


def clear(folder: Path) -> bool:
    """Remove a folder of ours that the caller holds. Other disks mounted in it stay. Whether it is gone."""
    with suppress(OSError):
        _empty(folder, folder.stat().st_dev, spare=MARKER)
        if os.listdir(folder) == [MARKER]:
            (folder / MARKER).unlink()
        folder.rmdir()
    return not os.path.lexists(folder)


def _empty(folder: Path, device: int, spare: str = "") -> None:
    for item in os.scandir(folder):
        if item.name == spare:
            continue
        if not item.is_dir(follow_symlinks=False):
            os.unlink(item.path)
        elif item.stat(follow_symlinks=False).st_dev == device:
            _empty(Path(item.path), device)
            with suppress(OSError):
                os.rmdir(item.path)


def _opened(folder: Path) -> int | None:
    if folder.is_symlink():
        return None
    for access in (os.O_RDWR, os.O_RDONLY):
        try:
            descriptor = os.open(folder / MARKER, access | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
                continue
            return None
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and os.read(descriptor, len(LINE) + 1) == LINE:
            return descriptor
        os.close(descriptor)
        return None
    return None


def _lock(descriptor: int, *, alone: bool) -> bool:
    """Whether the lock is ours. Where a disk knows no locks, many may use a folder, and none may remove it."""
    if fcntl is None:
        return not alone
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        return not alone and error.errno not in _BUSY
    return True


def _same(descriptor: int, path: Path) -> bool:
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(descriptor), found)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other builds from putting anything in place in a folder. Where its disk knows no locks, nobody is kept out.

    Raises:
        OutputError: another process has kept it for two minutes.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in _BUSY:
                    break
                if time.monotonic() > deadline:
                    raise OutputError(
                        f"another process keeps {folder} locked", fix="end it, or choose another folder with -o"
                    ) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)
