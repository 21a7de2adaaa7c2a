"""ship/benchmark: time the artifact on this host, and estimate it for the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from edgeship.core.model import Artifact
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import Request
from edgeship.core.report import Measurements


@dataclass(frozen=True)
class Benchmark(Pass):
    """Time the artifact on this host where that means something; say why not elsewhere."""

    name: ClassVar[str] = "ship/benchmark"
    local: ClassVar[bool] = True

    runtime: str = ""
    seconds: float = 1.0

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Always planned."""
        return cls(request.runtime)

    def run(self, model: Artifact, ctx: Context) -> Measurements:
        """Latency and peak memory, measured in a process of its own."""
        from edgeship.devices.host import time_artifact

        return Measurements(time_artifact(model, self.seconds))
