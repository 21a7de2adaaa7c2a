"""Whether files stayed what they were while somebody read them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

Stamp = tuple[int, ...]
_MAX_LINKS = 40


def stamp(path: Path) -> Stamp:
    """What changes with a file's content: its inode, size and times, and those of every link on the way to it.

    The time of the last change of the inode cannot be set back, unlike that of its content. Empty without a file.
    """
    try:
        found = path.stat()
        links = _links(path.absolute(), 0)
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, *links)


def stamps(paths: Iterable[Path]) -> dict[Path, Stamp]:
    """The stamp of each file."""
    return {path: stamp(path) for path in paths}


def moved(before: Mapping[Path, Stamp]) -> Path | None:
    """The first file whose stamp is no longer what it was."""
    return next((path for path, old in before.items() if stamp(path) != old), None)


def _links(path: Path, depth: int) -> list[int]:
    """Inode and time of each link in a path, and of those that they lead through."""
    found: list[int] = []
    for place in (path, *path.parents):
        if depth < _MAX_LINKS and place.is_symlink():
            item = place.lstat()
            found += [item.st_ino, item.st_ctime_ns]
            found += _links(place.parent / os.readlink(place), depth + 1)
    return found
