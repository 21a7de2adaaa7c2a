"""check/size: bytes on disk and in memory against the target's limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Self

from edgeship.core.choice import Choice
from edgeship.core.decoder import LEAST_CONTEXT, CacheType, Decoder, context_of
from edgeship.core.forms import ActivationMode
from edgeship.core.model import Artifact, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import Request
from edgeship.core.report import Measurement, Verdict
from edgeship.core.units import human_bytes
from edgeship.errors import UsageError

if TYPE_CHECKING:
    from edgeship.program.program import ProgramRecord

# What is predicted before a build is counted after it; so much more it may be.
ROOM = 1.1


@dataclass(frozen=True)
class CheckSize(Pass):
    """Compare the artifact's size, and the memory the app will need, with the limits.

    Args:
        limit_bytes: what one app may use on the target. max_size_bytes: limit for the files (``--max-size``).
        choice: how the profile wants activations computed.
        decoder, context, cache: a language model's caches, the positions that they keep, and how.
        profiles: how every other profile would store this model, to say which one would fit.
    """

    name: ClassVar[str] = "check/size"
    decided: ClassVar[Mapping[str, str]] = {"target": "--target", "profiles": "the profiles there are",
        "decoder": "the source", "context": "--context", "cache": "--kv-cache",
    }  # fmt: skip
    limits: ClassVar[tuple[str, ...]] = ("limit_bytes", "max_size_bytes")

    runtime: str = ""
    target: str = ""
    limit_bytes: int = 0
    max_size_bytes: int | None = None
    choice: Choice = field(default_factory=Choice)
    decoder: Decoder | None = None
    context: int | None = None
    cache: CacheType | None = None
    profiles: dict[str, Choice] = field(default_factory=dict)

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Always planned."""
        from edgeship.core.registry import profiles, runtimes

        others = {name: request.choice_of(profile) for name, profile in profiles().items()}
        others.pop(request.profile.name, None)
        others = {name: choice for name, choice in others.items() if _holds(request, choice)}
        return cls(
            request.runtime,
            request.target.name,
            int(request.target.app_memory_bytes.value),
            request.max_size_bytes,
            request.choice,
            request.decoder,
            request.context,
            runtimes()[request.runtime].cache_of(request.kv_cache, request.choice) if request.decoder else None,
            others,
        )

    def confirm(self, request: Request) -> None:
        """Refuse what cannot fit whatever is done, before minutes of conversion show it.

        Raises `UsageError` when even the smallest profile needs more memory than the target allows.
        """
        from edgeship.core.memory import predict
        from edgeship.core.registry import runtimes

        if request.inventory is None:
            return
        runtime, cache = runtimes()[self.runtime], self._cache_bytes(self.cache)
        needs = {
            name: predict(request.inventory, runtime, choice).memory + cache
            for name, choice in {**self.profiles, request.profile.name: self.choice}.items()
        }
        least = min(needs, key=lambda name: needs[name])
        # What is predicted here is counted at the end; a tenth is left for what a prediction cannot know.
        if needs[least] > ROOM * self.limit_bytes:
            words = f", of which {human_bytes(cache)} for {self._positions()} positions" if cache else ""
            raise UsageError(
                f"{request.source.reference} needs {human_bytes(needs[least])} on {self.target} even with --profile "
                f"{least}{words}; an app gets {human_bytes(self.limit_bytes)}",
                fix=self._way_out({name: need - cache for name, need in needs.items()}, request, least),
            )

    def _way_out(self, needs: Mapping[str, int], request: Request, least: str) -> str:
        """A context that fits beside what the model needs without its cache: with the order's profile, or with the one
        that needs least; one that is proposed would not be refused.

        Args:
            needs: by profile, without caches.
        """
        for name in (request.profile.name, least):
            longest = self._longest_context(round(ROOM * needs[name]), self.cache)
            if longest:
                return f"{'' if name == request.profile.name else f'--profile {name} '}--context {longest} would fit"
        return "choose a smaller model, or a larger target"

    def _positions(self) -> int:
        return context_of(self.decoder, self.context) if self.decoder else 0

    def _cache_bytes(self, kept: CacheType | None) -> int:
        return self._copies() * self.decoder.cache_bytes(self._positions(), kept) if self.decoder and kept else 0

    def _copies(self) -> int:
        from edgeship.core.registry import runtimes

        return runtimes()[self.runtime].engine.cache_copies

    def _longest_context(self, without_cache: int, kept: CacheType | None) -> int:
        """The most positions, of those the model has, whose cache fits beside the rest; 0 when none do that an order
        may ask for."""
        if self.decoder is None or kept is None:
            return 0
        fixed = self._copies() * self.decoder.cache_bytes(0, kept)
        each = self._copies() * self.decoder.cache_bytes(1, kept) - fixed
        left = self.limit_bytes - without_cache - fixed
        longest = min(self.decoder.context, left // each) if each else self.decoder.context * (left >= 0)
        return longest if longest >= LEAST_CONTEXT else 0

    def run(self, model: Artifact, reference: TorchModel, ctx: Context) -> Verdict:
        """Files as they are; memory from what was decided: weights as the engine keeps them, activations, engine."""
        from edgeship.core.artifact import total_bytes
        from edgeship.core.memory import footprint, predict
        from edgeship.core.registry import runtimes
        from edgeship.program.program import read_record

        record = read_record(reference)
        runtime = runtimes()[self.runtime]
        halves, tied = model.compute == "f16", record.aliases
        needs = footprint(
            record.inventory, runtime, record.encodings, self._activations(record), halves=halves, tied=tied
        )
        kept = model.language.cache if model.language else self.cache
        needs = replace(needs, cache=self._cache_bytes(kept))
        files = total_bytes(model.path)
        figures: tuple[Measurement, ...] = (
            Measurement("file_bytes", files, "bytes", "measured", runtime=self.runtime),
            Measurement("memory_bytes", needs.memory, "bytes", "estimated", self.target, self.runtime),
            Measurement("memory_weights", needs.weights, "bytes", "estimated", self.target, self.runtime),
            Measurement("memory_activations", needs.activations, "bytes", "estimated", self.target, self.runtime),
        )
        longest = self._longest_context(needs.memory - needs.cache, kept)
        if self.decoder is not None:
            figures += (
                Measurement("memory_cache", needs.cache, "bytes", "estimated", self.target, self.runtime),
                Measurement("longest_context", longest, "positions", "estimated", self.target, self.runtime),
            )
        over = []
        if needs.memory > self.limit_bytes:
            over.append(
                f"needs {human_bytes(needs.memory)} of memory, {self.target} allows {human_bytes(self.limit_bytes)}"
            )
        if self.max_size_bytes is not None and files > self.max_size_bytes:
            excess = files - self.max_size_bytes
            over.append(
                f"is {human_bytes(files)}, {human_bytes(excess)} over --max-size {human_bytes(self.max_size_bytes)}"
            )
        if not over:
            memory = f"about {human_bytes(needs.memory)} of {human_bytes(self.limit_bytes)} in memory"
            summary = f"{human_bytes(files)} on disk, {memory}"
            if self.decoder is not None:
                cache = f"{human_bytes(needs.cache)} of it for {self._positions()} positions in {kept}"
                summary += f", {cache}; the longest context that fits is {longest}"
            return Verdict(self.name, self.runtime, True, summary, figures)
        others = {name: predict(record.inventory, runtime, item, tied=tied) for name, item in self.profiles.items()}
        # What the file holds besides weights is in every other one too.
        graph = max(0, files - needs.stored)
        sizes = {name: other.stored + graph for name, other in others.items()}
        fitting = [
            name
            for name, other in others.items()
            if other.memory + needs.cache <= self.limit_bytes
            and (self.max_size_bytes is None or sizes[name] <= self.max_size_bytes)
        ]
        proposals = [f"--profile {name}" for name in sorted(fitting, key=lambda name: -sizes[name])]
        if longest and (self.max_size_bytes is None or files <= self.max_size_bytes):
            proposals.insert(0, f"--context {longest}")
        least = f"; the smallest makes about {human_bytes(min(sizes.values()))}" if sizes else ""
        fix = f"{' or '.join(proposals)} would fit" if proposals else f"no profile fits{least}"
        return Verdict(self.name, self.runtime, False, f"{self.runtime} artifact {' and '.join(over)}", figures, fix)

    def _activations(self, record: ProgramRecord) -> ActivationMode:
        """How activations are computed: on the grids that were decided, or as the profile says where there are none."""
        if record.activations:
            return "int16" if next(iter(record.activations.values())).bits == 16 else "int8"
        return "dynamic" if self.choice.activations == "dynamic" else "float"


def _holds(request: Request, choice: Choice) -> bool:
    """Whether a runtime stores every weight as another profile has it: what would be refused is not proposed."""
    from edgeship.core.memory import planned
    from edgeship.core.registry import runtimes

    runtime = runtimes()[request.runtime]
    if request.inventory is None or choice.weights == "auto":
        return True
    for use in request.inventory.weights:
        if use.op == "other":
            continue
        encoding = planned(choice, use)
        if runtime.holds(use.op, encoding, choice.activations):
            return False
        if runtime.refused_by_system(encoding, request.target, request.options):
            return False
    return True
