"""What a network remembers of its training about the answers of a layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Expected:
    """Mean and spread of each channel of a layer's answers in training, ``[channels]`` each."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
