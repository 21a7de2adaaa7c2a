"""The artifact, and the board that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from edgeship.core.model import Artifact


@dataclass(frozen=True)
class ZipGraphModel(Artifact):
    """A ``.zipgraph``: ``graph.json``, and an array in NumPy's own format for each part of a weight."""

    kind: ClassVar[str] = "ZipGraphModel"
    runtime: ClassVar[str] = "zipgraph"
    suffix: ClassVar[str] = ".zipgraph"


def targets_folder() -> Path:
    """Where the targets of this package lie."""
    return Path(__file__).parent / "targets"
