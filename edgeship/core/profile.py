"""What the user wants: a profile (intent, device-free) and a request (source, target, runtime, profile, options)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgeship.core.choice import Choice as Choice
from edgeship.core.decoder import CacheType, Decoder
from edgeship.core.forms import ActivationMode
from edgeship.core.inventory import Inventory
from edgeship.core.model import Source
from edgeship.core.runtimes import Engine
from edgeship.core.target import Target
from edgeship.errors import UsageError


@dataclass(frozen=True)
class Profile:
    """Intent, independent of the device.

    Args:
        name: as in ``--profile``. summary: one sentence for people.
        default: what every runtime gets unless `runtimes` says otherwise.
        runtimes: exceptions by runtime name, with the reason in `why`.
        max_drop: the largest loss of accuracy or perplexity allowed, as a fraction (0.005 is half a point of accuracy).
    """

    name: str
    summary: str
    default: Choice
    runtimes: dict[str, Choice] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    max_drop: float | None = None

    def __post_init__(self) -> None:
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise UsageError(f"max_drop {self.max_drop:g} is not a share", fix="write 0.01 for one point of a hundred")

    def choice(self, runtime: str, format: str = "") -> Choice:
        """The choice for one runtime: its own, or that of its ``format``, or what every runtime gets."""
        return self.runtimes.get(runtime, self.runtimes.get(format, self.default))


@dataclass(frozen=True)
class DataRef:
    """Calibration or evaluation data: where they lie, and the digest of what is there.

    Args:
        title: what messages call data that were given from memory; others are called by their reference.
    """

    reference: str
    digest: str
    title: str = ""

    @property
    def shown(self) -> str:
        """What messages call them."""
        return self.title or self.reference


@dataclass(frozen=True)
class AdapterRef:
    """A PEFT adapter that ships beside its base: its name there, its folder, and the digest of what that holds."""

    name: str
    folder: str
    digest: str


@dataclass(frozen=True)
class Request:
    """Everything a pass may plan from: one route, from one source to one runtime on one target.

    Args:
        inventory: weights and operators of the loaded model; None while the loader itself is planned.
        options: what the user set of passes, by pass name and field, in the field's own type (`core.settings`).
        raised: what the accuracy gate gave back: (weight, short name of its encoding), for this route only.
        keep: weights that the user wants in an encoding of their own: (weight, its short name).
        spare_bytes: what the size gate took from the budget of ``auto``, for this route only.
        rank: the accuracy gate fell short: measure what each layer costs.
        context: positions that a language model's artifact keeps, when the user said. decoder: of that model.
        kv_cache: how it keeps keys and values, when the user said. adapters: that ship beside it.
        unbounded: float inputs of the loaded model of which nothing says what range they have.
        weights, activations: what the user wants in place of the profile's, for every runtime.
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
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)
    raised: tuple[tuple[str, str], ...] = ()
    keep: tuple[tuple[str, str], ...] = ()
    spare_bytes: int = 0
    rank: bool = False
    context: int | None = None
    decoder: Decoder | None = None
    kv_cache: CacheType | None = None
    adapters: tuple[AdapterRef, ...] = ()
    unbounded: tuple[str, ...] = ()
    weights: str | None = None
    activations: ActivationMode | None = None

    @property
    def choice(self) -> Choice:
        """How the user, and else the profile, wants weights and activations for this runtime."""
        choice = self.choice_of(self.profile)
        if self.weights is not None:
            choice = replace(choice, weights=self.weights, candidates=())
        if self.activations is not None:
            return replace(choice, activations=self.activations, quickest=False)
        return choice if self.weights is None else replace(choice, activations=self._computing(choice))

    def _computing(self, choice: Choice) -> ActivationMode:
        """What layers compute in where the user said how weights are stored and no more: the profile's, or the first
        of the engine's own with which it holds such weights; the profile's where there is none, to be refused."""
        from edgeship.core.encodings import ENCODED_OPS, encoding_named, fitted
        from edgeship.core.runtime_registry import runtimes

        runtime = runtimes().get(self.runtime)
        if runtime is None or self.inventory is None:
            return choice.activations
        encoding = encoding_named(choice.weights)
        stored = {(use.op, fitted(encoding, use)) for use in self.inventory.weights if use.op in ENCODED_OPS}
        for mode in (choice.activations, *runtime.engine.computes):
            known = mode != "int8" or self.calibration is not None
            if known and not any(runtime.holds(op, form, mode) for op, form in stored):
                return mode
        return choice.activations

    def choice_of(self, profile: Profile) -> Choice:
        """How any profile wants them for this runtime.

        A static 8-bit grid has no basis where no data say what inputs look like; then the runtime's own next best is
        taken (`Engine.unseen`), and with an input of unknown range its `Engine.unbounded`. A profile that wants the
        quickest gets what measured times of layers say of the model.
        A source that is quantized already is computed as its maker decided, where the runtime can.
        """
        from edgeship.core.runtime_registry import runtimes
        from edgeship.core.speed import quickest

        runtime = runtimes().get(self.runtime)
        if runtime is None:
            return profile.choice(self.runtime)
        choice, engine = profile.choice(self.runtime, runtime.format.name), runtime.engine
        given = self.inventory.activations if self.inventory is not None else ""
        if given and (given != "dynamic" or "dynamic" in engine.computes):
            able = given in engine.computes
            return replace(choice, activations=given if able else "float")  # type: ignore[arg-type]
        if self.calibration is None:
            choice = self._without_data(choice, engine)
        if not choice.quickest or self.inventory is None:
            return choice
        return replace(choice, activations=quickest(self.runtime, self.inventory, choice.activations))

    def _without_data(self, choice: Choice, engine: Engine) -> Choice:
        """What an engine computes with where no data say what inputs look like."""
        if choice.activations == "int8":
            choice = replace(choice, activations=engine.unseen)
        # Who asks for a grid, or for how weights are stored, means it.
        said = {"compress/calibrate", "compress/quantize"}.intersection(self.options)
        if choice.activations != "int16" or engine.unbounded == "int16" or not self.unbounded or said or self.weights:
            return choice
        if choice.weights != "int8" and not (choice.weights == "auto" and self._halves_fit()):
            # A profile of fewer bits is about its size.
            return choice
        return replace(choice, activations=engine.unbounded, weights="float16", candidates=())

    def _halves_fit(self) -> bool:
        """Whether all weights in float16 are within the bytes there are."""
        limit = self.max_size_bytes or int(self.target.app_memory_bytes.value)
        return self.inventory is not None and 2 * self.inventory.parameters <= limit
