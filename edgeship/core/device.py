"""What a device is: a place where a shipped artifact gets its figures. This host, an estimate; later a phone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from edgeship.core.choice import Choice
from edgeship.core.inventory import Inventory
from edgeship.core.model import Artifact
from edgeship.core.report import Measurement
from edgeship.errors import UsageError


@dataclass(frozen=True)
class TextOrder:
    """What a language model is timed on: 512 tokens of a prompt and 128 that are written, unless said otherwise.

    Args:
        prompt, new: tokens taken and tokens written. depths: tokens in the cache before, one row each.
        runs: timed repetitions, after one that is not counted.
    """

    prompt: int = 512
    new: int = 128
    depths: tuple[int, ...] = (0,)
    runs: int = 3

    def __post_init__(self) -> None:
        least = {"prompt": (self.prompt, 1), "new": (self.new, 2), "runs": (self.runs, 1)}
        for name, (value, low) in [*least.items(), *(("depth", (depth, 0)) for depth in self.depths)]:
            if value < low:
                raise UsageError(f"{value} is too small for {name}", fix=f"give at least {low}")


@dataclass(frozen=True)
class Shipped:
    """One artifact of a bundle with what its figures depend on.

    Args:
        inventory: weights and operators of the program it came from. choice: how weights are stored.
        weight_bytes: bytes of each encoded weight as stored, by name. text: what a language model is timed on.
    """

    artifact: Artifact
    inventory: Inventory
    choice: Choice
    weight_bytes: dict[str, int]
    text: TextOrder | None = None


class Device(ABC):
    """Where a benchmark runs. ``bench --device NAME`` or ``--device NAME:ARGUMENT`` finds it by name.

    Class attributes:
        name: the part before the colon. argument: what the part after it is called, empty when there is none.
        summary: one sentence for people.
    """

    name: ClassVar[str]
    argument: ClassVar[str] = ""
    summary: ClassVar[str]

    @abstractmethod
    def measure(self, shipped: Shipped, argument: str, seconds: float) -> tuple[Measurement, ...]:
        """The figures of one artifact; without a value, and with the reason in the note, where there are none.

        Args:
            argument: the part after the colon. seconds: how long to time, where it is timed.
        """
