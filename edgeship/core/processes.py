"""Whether the process that left something behind still runs."""

from __future__ import annotations

import os


def is_alive(pid: str) -> bool:
    """Whether ``pid``, the end of a folder's name, is a running process on this machine."""
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
