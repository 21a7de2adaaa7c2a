"""What edgeship takes from Python itself that Python does not document, or that cannot be taken back.

Written for CPython 3.11 to 3.13.
"""

from __future__ import annotations

import atexit
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["PlainUnpickler", "opened_files", "run_exit_functions"]

# The reader of pickles that is written in Python; the one in C allocates what a file says before it looks.
PlainUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


def run_exit_functions() -> None:
    """Run what was registered with `atexit`, for a process that ends without tearing the interpreter down."""
    atexit._run_exitfuncs()


# Called with what was opened, and whether to write.
Listener = Callable[[Any, bool], None]
_listeners: tuple[Listener, ...] = ()
_is_hooked = False
_LOCK = threading.Lock()


@contextmanager
def opened_files(listener: Listener) -> Iterator[None]:
    """Tell a function of every file that Python opens inside, in any thread, before it is opened.

    An audit hook cannot be taken back. So there is one for the whole process, made at the first use: it does nothing
    while no block is open, and nothing of a block is kept after it.
    """
    global _listeners, _is_hooked
    with _LOCK:
        if not _is_hooked:
            sys.addaudithook(_tell)
            _is_hooked = True
        _listeners = (*_listeners, listener)
    try:
        yield
    finally:
        with _LOCK:
            # One of equal ones: blocks may be open in several threads.
            place = _listeners.index(listener)
            _listeners = _listeners[:place] + _listeners[place + 1 :]


def _tell(event: str, args: tuple[Any, ...]) -> None:
    if not _listeners or event != "open":
        return
    path, mode, flags = args
    # os.open says no mode, only flags.
    writing = isinstance(mode, str) and any(letter in mode for letter in "wax+")
    writing = writing or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) != 0)
    for listener in _listeners:
        listener(path, writing)
