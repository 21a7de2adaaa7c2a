"""What the user wants: a profile (intent, device-free) and a request (source, target, runtime, profile, options)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeship.core.inventory import Inventory
from edgeship.core.model import Source
from edgeship.core.runtimes import ActivationMode
from edgeship.core.target import Target


@dataclass(frozen=True)
class Choice:
    """How to store weights and compute activations for one runtime.

    Args:
        weights: ``float32``, ``float16`` or ``int8``.
        activations: ``float``, ``int8``, ``int16`` (static), or ``dynamic`` (int8, decided while running).
    """

    weights: str = "float16"
    activations: ActivationMode = "float"


@dataclass(frozen=True)
class Profile:
    """Intent, independent of the device.

    Args:
        name: as in ``--profile``. summary: one sentence for people.
        default: what every runtime gets unless `runtimes` says otherwise.
        runtimes: exceptions by runtime name, with the reason in `why`.
        max_drop: the largest loss of the metric allowed, as a fraction (0.005 is half a point of accuracy).
    """

    name: str
    summary: str
    default: Choice
    runtimes: dict[str, Choice] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    max_drop: float | None = None

    def choice(self, runtime: str) -> Choice:
        """The choice for one runtime."""
        return self.runtimes.get(runtime, self.default)


@dataclass(frozen=True)
class DataRef:
    """Calibration or evaluation data that the user named: a reference and the digest of what it holds."""

    reference: str
    digest: str


@dataclass(frozen=True)
class Request:
    """Everything a pass may plan from: one route, from one source to one runtime on one target.

    Args:
        inventory: weights and operators of the loaded model; None while the loader itself is planned.
        options: ``--set`` values by pass name and field.
    """

    source: Source
    target: Target
    runtime: str
    profile: Profile
    inventory: Inventory | None = None
    calibration: DataRef | None = None
    evaluation: DataRef | None = None
    metric: str | None = None
    max_size_bytes: int | None = None
    max_drop: float | None = None
    estimate_targets: tuple[Target, ...] = ()
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)

    @property
    def choice(self) -> Choice:
        """How the profile wants weights and activations for this runtime."""
        return self.profile.choice(self.runtime)
