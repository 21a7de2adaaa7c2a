"""Change something of another library, or of the process, for the length of a block."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Blocks that overlapped in two threads would each put back what the other had put there.
_LOCK = threading.RLock()


@contextmanager
def exchanged(owner: object, name: str, value: object) -> Iterator[None]:
    """``owner.name`` is ``value`` inside, and afterwards what it was, also when the block fails.

    Other threads that exchange something wait until the block ends; those that only use the library see the new value
    meanwhile, so a function put there asks whose thread it runs in when that matters.

    Args:
        owner: a module, or a class that has the attribute itself and does not inherit it.

    Raises:
        AttributeError: there is no such attribute: the library is another one than edgeship was written for.
    """
    with _LOCK:
        before = vars(owner).get(name, _MISSING)
        if before is _MISSING:
            raise AttributeError(f"{owner!r} has no {name}")
        setattr(owner, name, value)
        try:
            yield
        finally:
            setattr(owner, name, before)


_MISSING = object()


# Logger -> its own level, and the levels of the blocks that are open, the newest last.
_levels: dict[str, tuple[int, list[int]]] = {}


@contextmanager
def log_level(name: str, level: int) -> Iterator[None]:
    """A logger drops what is below a level inside. When the last of several blocks ends it has its own level again,
    in whichever order they end."""
    logger = logging.getLogger(name)
    with _LOCK:
        _, open_levels = _levels.setdefault(name, (logger.level, []))
        open_levels.append(level)
        logger.setLevel(level)
    try:
        yield
    finally:
        with _LOCK:
            own, open_levels = _levels[name]
            open_levels.remove(level)
            logger.setLevel(open_levels[-1] if open_levels else own)
            if not open_levels:
                del _levels[name]
