"""Ctrl-C, also where a library swallows it.

Python raises KeyboardInterrupt wherever it happens to be. Some libraries catch it while they are imported or in a
callback from C++, and go on or raise an error of their own. So the press is remembered, and asked for between steps.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

EXIT_CODE = 130
MESSAGE = "stopped; run the same command again to go on where it stopped"
_pressed = False
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


def _press(number: int, frame: FrameType | None) -> None:
    global _pressed
    if _pressed:
        os.write(_terminal, f"{MESSAGE}\n".encode())
        os._exit(EXIT_CODE)
    _pressed = True
    raise KeyboardInterrupt
