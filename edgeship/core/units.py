"""Numbers as people read and write them: ``1.2 GB``, ``3GB``, ``1%``. Inside, everything is bytes and fractions."""

from __future__ import annotations

import re

from edgeship.errors import UsageError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_UP = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
# More than any disk: a number of 400 digits is a slip of the keyboard.
_MOST_BYTES = 10**15


def human_bytes(count: float) -> str:
    """Bytes with three significant figures, powers of ten."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        # From 999.5 of the next smaller unit on, three figures round up to this one.
        if abs(count) >= 0.9995 * size:
            return f"{count / size:.3g} {unit}" if abs(count) < 999.5 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def rounded_up(count: int) -> str:
    """A size as `parse_bytes` reads it, in three figures and no smaller: ``3.46MB``. What is proposed must do."""
    size, unit = next(((size, unit) for unit, size in _UP if count >= size), (1, ""))
    # In hundredths, tenths or wholes of the unit, rounded up.
    parts = next((parts for parts in (100, 10) if count * parts < 1000 * size), 1)
    return f"{-(-count * parts // size) / parts:.15g}{unit}"


def parse_bytes(text: str) -> int:
    """``3GB``, ``850 MB``, ``1.5GiB`` or plain bytes. Raises `UsageError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(f"{text[:40]!r} is not a size", fix="write 3GB or 850MB")
    bytes_wanted = float(match[1]) * _UNITS[match[2].lower()]
    if bytes_wanted > _MOST_BYTES:
        raise UsageError(f"a size of {text[:20]}{'...' * (len(text) > 20)} is not a limit", fix="write 3GB or 850MB")
    count = int(bytes_wanted)
    if count <= 0:
        raise UsageError(f"a size of {text[:40]!r} holds nothing", fix="write 3GB or 850MB")
    return count


def counted(count: int, noun: str) -> str:
    """``1 weight``, ``3 weights``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def parse_fraction(text: str) -> float:
    """``1%`` or ``0.01``, between 0 and 1. Raises `UsageError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text, re.ASCII)
    value = float(match[1]) if match else -1.0
    if match and match[2]:
        value /= 100
    if not 0 <= value <= 1:
        raise UsageError(f"{text[:40]!r} is not a share", fix="write 1% or 0.01")
    return value
