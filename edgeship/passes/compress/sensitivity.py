"""compress/sensitivity: measure what each layer loses in each encoding."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from edgeship.core.encodings import ENCODED_OPS, short_name
from edgeship.core.model import TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.planning import Candidates, Method, held_candidates, rounding_method, ways_to_store
from edgeship.core.profile import DataRef, Request
from edgeship.errors import UsageError

if TYPE_CHECKING:
    from edgeship.compression.walk import Layer
    from edgeship.core.inventory import WeightUse
    from edgeship.core.weights import EncodedTensor

# Beside the program that it was measured on: weight name -> short name of an encoding -> loss.
LOSSES = "losses.json"


@dataclass(frozen=True)
class MeasureSensitivity(Pass):
    """Measure what the model's outputs lose by each layer in each encoding, for compress/allocate (profile auto).

    Args:
        candidates: (operator, short names of encodings).
        method: as compress/quantize will round: what rounding to nearest loses says little of what GPTQ does.
        data: inputs; generated from ``seed`` when not given.
        calibration: how many of them at most, when rounding looks at them; ``samples`` of these are kept from it.
        samples: how many losses are taken on.
    """

    name: ClassVar[str] = "compress/sensitivity"
    tools: ClassVar[tuple[str, ...]] = ("torch",)
    settles: ClassVar[str] = "losses"
    after: ClassVar[tuple[str, ...]] = ("compress/prune", "compress/smooth")
    decided: ClassVar[dict[str, str]] = {"candidates": "--profile", "method": "compress/quantize.method"}

    candidates: Candidates = ()
    method: Method = "clipped"
    data: DataRef | None = None
    calibration: int = 128
    samples: int = 16
    seed: int = 0

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Planned for profiles whose weights are ``auto``."""
        if request.choice.weights != "auto":
            return Skip(f"profile {request.profile.name} decides the weights itself")
        return cls(held_candidates(request), rounding_method(request), request.calibration)

    def confirm(self, request: Request) -> None:
        """Refuse to measure on nothing."""
        if self.samples < 1 or self.calibration < 1:
            raise UsageError(f"{self.name} needs at least 1 sample", fix="leave the options out")

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Write the program as it was, and ``losses.json`` beside it."""
        from edgeship.compression.encode import Encoder
        from edgeship.compression.sensitivity import measure_sensitivity
        from edgeship.data.batches import calibration_batches
        from edgeship.program.program import TorchProgram

        program = TorchProgram.open(model)
        aliases = program.record.aliases
        uses = [use for use in program.record.inventory.weights if use.op in ENCODED_OPS and use.name not in aliases]
        names = [use.name for use in uses]
        looks = self.data is not None and self.method in ("gptq", "awq")
        count = self.calibration if looks else self.samples
        batches = calibration_batches(self.data, program.signature, count, self.seed)
        encoder = Encoder(program, {}, self.method)

        def ways(use: WeightUse) -> Callable[[Layer | None], Iterator[EncodedTensor]]:
            encodings = ways_to_store(self.candidates, use)
            # Without data a layer is rounded from its own numbers.
            return lambda layer: (encoder.encode_one(use, item, layer if looks else None) for item in encodings)

        found = measure_sensitivity(
            program,
            ((use.name, ways(use)) for use in uses),
            batches,
            lambda name: ctx.progress(names.index(name), len(names), name),
            self.samples if looks else 0,
        )
        losses: dict[str, dict[str, float]] = {}
        for name, options in found.items():
            losses[name] = {short_name(way.encoding): way.loss for way in options}
        note = f"{self.name}: {self.method}, on {min(self.samples, len(batches))} samples"
        record = replace(program.record, history=(*program.record.history, note))
        folder = ctx.folder / "program"
        replace(program, record=record).save(folder)
        (folder / LOSSES).write_text(json.dumps(losses, indent=1), encoding="utf-8")
        return TorchModel(folder, model.signature)
