"""ship/package: write the bundle, whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from edgeship.core.artifact import Bundle, Gathered
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import Request


@dataclass(frozen=True)
class PackageBundle(Pass):
    """Write artifacts, manifest and report into one folder, whole or not at all."""

    name: ClassVar[str] = "ship/package"
    cached: ClassVar[bool] = False

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Always planned."""
        return cls()

    def run(self, gathered: Gathered, ctx: Context) -> Bundle:
        """Copy every artifact, write manifest and report, and put the folder in place in one rename."""
        from edgeship.shipping.bundle import publish

        return publish(gathered)
