"""A process that is killed at a chosen moment: what it would have changed on disk from then on does not happen."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHANGES = {Path: ("rename", "unlink", "rmdir", "mkdir"), os: ("unlink", "rmdir")}


class Killed(BaseException):
    """Stands for kill -9."""


def deadly(patch: pytest.MonkeyPatch, moment: int, *more: tuple[Any, str]) -> None:
    """Let everything that changes a folder fail from the ``moment``-th time on, as it does for a dead process.

    Args:
        more: functions beside `CHANGES` that change one: (owner, name).
    """
    calls: list[str] = []

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls.append(name)
            if len(calls) > moment:
                raise Killed
            return real(*arguments, **named)

        return call

    usual = [(owner, name) for owner, names in CHANGES.items() for name in names]
    for owner, name in (*usual, *more):
        patch.setattr(owner, name, wrapped(name, getattr(owner, name)))
