"""What a program knows of outputs of which not all rows count."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counted:
    """An output whose rows on ``axis`` count as far as the output ``count`` says; the others are zeros."""

    count: str
    axis: int
