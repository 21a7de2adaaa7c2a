"""Numbers as people read and write them: ``1.2 GB``, ``3GB``, ``1%``. Inside, everything is bytes and fractions."""

from __future__ import annotations

import re

from edgeship.errors import UsageError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def human_bytes(count: float) -> str:
    """Bytes with three significant figures, powers of ten."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        # From 999.5 of the next smaller unit on, three figures round up to this one.
        if abs(count) >= 0.9995 * size:
            return f"{count / size:.3g} {unit}" if abs(count) < 999.5 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def parse_bytes(text: str) -> int:
    """``3GB``, ``850 MB``, ``1.5GiB`` or plain bytes. Raises `UsageError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(f"{text!r} is not a size", fix="write 3GB or 850MB")
    count = int(float(match[1]) * _UNITS[match[2].lower()])
    if count <= 0:
        raise UsageError(f"a size of {text!r} holds nothing", fix="write 3GB or 850MB")
    return count


def parse_fraction(text: str) -> float:
    """``1%`` or ``0.01``, between 0 and 1. Raises `UsageError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value <= 1:
        raise UsageError(f"{text!r} is not a share", fix="write 1% or 0.01")
    return value
