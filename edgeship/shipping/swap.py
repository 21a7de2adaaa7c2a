"""Put a finished folder in place in one step, so that a reader sees the old one or the new one, never half."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def put_in_place(ready: Path, final: Path, aside: Path, accept: Callable[[Path], None]) -> None:
    """Move the folder ``ready`` to ``final`` on the same file system; a folder that is there ends up at ``aside``.

    Linux exchanges the two names in one system call; elsewhere the old folder is moved aside first, which leaves a
    moment with none.

    Args:
        accept: called with the old folder once nobody reaches it by its name any more. What it raises is raised, and
            the old folder is back where it was, with whatever somebody put into it at the last moment.
    """
    if not os.path.lexists(final):
        ready.rename(final)
        return
    if _exchange(ready, final):
        try:
            accept(ready)
        except BaseException:
            _exchange(ready, final)
            raise
        ready.rename(aside)
        return
    final.rename(aside)
    try:
        accept(aside)
        ready.rename(final)
    except BaseException:
        aside.rename(final)
        raise


def _exchange(one: Path, other: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    done = libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if done == 0:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
