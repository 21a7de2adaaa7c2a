"""Change something of another library for the length of a block, where it offers no option for it."""

from __future__ import annotations

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
