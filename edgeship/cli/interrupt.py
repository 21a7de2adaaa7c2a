"""Ctrl-C, also where a library swallows it.

Python raises KeyboardInterrupt wherever it happens to be. Some libraries catch it while they are imported or in a
callback from C++, and go on or raise an error of their own. So the press is remembered, and asked for between steps.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 130
MESSAGE = "stopped; run the same command again to go on where it stopped"
_message = MESSAGE
_pressed = False
# While something that can be stopped by itself runs, the first press only says so.
_held = False
# Standard error goes to the log while a step runs; the last word goes to the terminal.
_terminal = 2


def listen() -> None:
    """Remember Ctrl-C from here on. The first press raises KeyboardInterrupt, the second ends the process at once."""
    global _terminal
    _terminal = os.dup(2)
    signal.signal(signal.SIGINT, _press)


def ignore() -> None:
    """Nothing is left to stop: the interpreter ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def was_pressed() -> bool:
    """Whether somebody asked to stop."""
    return _pressed


def stop_if_pressed() -> None:
    """Raise KeyboardInterrupt when a press was swallowed."""
    if _pressed:
        raise KeyboardInterrupt


def message() -> str:
    """What is said when the command ends by Ctrl-C."""
    return _message


@contextmanager
def saying(text: str) -> Iterator[None]:
    """A command that has other words for its end than `MESSAGE`."""
    global _message
    before, _message = _message, text
    yield
    # Not on the way out of a press: it is said after this.
    _message = before


@contextmanager
def held() -> Iterator[Callable[[], bool]]:
    """Something that is stopped by itself, and not the command with it: gives whether it shall stop.

    A second press, while it has not stopped yet, ends the process.
    """
    global _held, _pressed
    _held = True
    try:
        yield was_pressed
    finally:
        _held = _pressed = False


def _press(number: int, frame: FrameType | None) -> None:
    global _pressed
    if _pressed:
        os.write(_terminal, f"\n{_message}\n".encode() if _held else f"{_message}\n".encode())
        os._exit(EXIT_CODE)
    _pressed = True
    if not _held:
        raise KeyboardInterrupt
