"""What edgeship changes in safetensors. Written for safetensors 0.5 to 0.8.

It ends when safetensors raises Python's audit event ``open`` for the files that it opens in Rust.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import safetensors

__all__ = ["opened_files"]

NAME = "safe_open"

# Called with the name of the file.
Listener = Callable[[Any], None]
_LOCK = threading.Lock()
_listeners: tuple[Listener, ...] = ()
_original: Any = safetensors.safe_open


@contextmanager
def opened_files(listener: Listener) -> Iterator[None]:
    """Tell a function of every file that safetensors opens inside, in any thread, before it is opened.

    Afterwards ``safe_open`` is the library's own again wherever a module has taken the name over, also when the block
    fails; while blocks overlap, the last one ends it.
    """
    global _listeners
    with _LOCK:
        if not _listeners:
            _exchange(_original, _safe_open)
        _listeners = (*_listeners, listener)
    try:
        yield
    finally:
        with _LOCK:
            place = _listeners.index(listener)
            _listeners = _listeners[:place] + _listeners[place + 1 :]
            if not _listeners:
                # Those that were imported meanwhile have it, too.
                _exchange(_safe_open, _original)


def _safe_open(filename: Any, *args: Any, **kwargs: Any) -> Any:
    for listener in _listeners:
        listener(filename)
    return _original(filename, *args, **kwargs)


def _exchange(old: Any, new: Any) -> None:
    """Put a function in place of another wherever a library has taken the name over."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        # This file keeps the library's own.
        if isinstance(names, dict) and names.get(NAME) is old:
            setattr(module, NAME, new)
