"""A language model for the Neural Engine: as `edgeship.lowering.coreml.decoder`, with rebuilt layers, in parts of less
than a gigabyte.

A package of one part has the functions prefill and decode; of more, prefill_1, prefill_2 .. and decode_1, decode_2 ..,
each but the first taking as ``hidden (1, C, 1, T)`` what the one before gives as ``next_hidden``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeship.errors import LoweringError
from edgeship.llm.models import read_config
from edgeship.lowering.coreml.check import checked_roles
from edgeship.lowering.coreml.decoder import Weights, convert
from edgeship.lowering.coreml.neural import NeuralStep
from edgeship.lowering.coreml.parts import GENERIC, layers_of
from edgeship.lowering.coreml.places import Piece

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgeship.core.decoder import Decoder
    from edgeship.core.model import Placement
    from edgeship.lowering.coreml.parts import Roles
    from edgeship.program.program import TorchProgram


def roles_of(program: TorchProgram) -> list[Roles] | LoweringError:
    """The parts of a program's layers, or why they cannot be rebuilt."""
    decoder, origin = program.language()
    if not decoder.is_whole or decoder.counted or decoder.masked or any(call.sinks for call in decoder.calls):
        return LoweringError("layers are not rebuilt for the Neural Engine: they attend in another way", fix=GENERIC)
    try:
        return checked_roles(read_config(origin), decoder.layers)
    except LoweringError as error:
        return error


def lower_neural(
    program: TorchProgram, roles: Sequence[Roles], path: Path, context: int, chunk: int, half: bool, part_bytes: int,
    facts: dict[str, str],
) -> tuple[Placement, ...]:  # fmt: skip
    """Write the package; where it keeps each weight.

    Args:
        roles: of the modules of each layer, checked. context: positions in the caches.
        chunk: tokens of a prefill. half: compute in float16.
        part_bytes: of the weights of one part at most; a single layer or table may take more.
        facts: the number of parts and the bytes of the largest are added.

    Raises:
        LoweringError: a weight was lost.
        EncodingError: an encoding has no form.
    """
    assert program.origin is not None
    assert program.record.decoder is not None
    decoder = program.record.decoder
    weights = Weights(program, half)
    ranges = _split(_Builder(weights, decoder, roles, context, logits=True), part_bytes, facts)
    functions = {}
    for kind, tokens in (("prefill", chunk), ("decode", 1)):
        builder = _Builder(weights, decoder, roles, context, logits=tokens == 1)
        for number, layers in enumerate(ranges, 1):
            step, apart = builder.step(layers)
            given = {"input_ids": (1, tokens)} if step.first else {"hidden": (1, decoder.hidden, 1, tokens)}
            output = "next_hidden"
            if step.last:
                output = "logits" if tokens == 1 else "next_position"
            functions[kind if len(ranges) == 1 else f"{kind}_{number}"] = convert(step, given, output, apart, weights)
    return weights.write(functions, path, facts)


class _Builder:
    """Makes steps of some layers from one hollow model."""

    def __init__(
        self, weights: Weights, decoder: Decoder, roles: Sequence[Roles], context: int, *, logits: bool
    ) -> None:
        self.weights, self.sizes, self.context, self.logits = weights, decoder.layers, context, logits
        self.model, names = weights.model()
        self.parts = [role.of(layer) for role, layer in zip(roles, layers_of(self.model), strict=True)]
        named = self.model.named_parameters(remove_duplicate=False)
        self.program_name = {id(held): names[name] for name, held in named}

    def step(self, layers: range) -> tuple[NeuralStep, dict[str, Piece]]:
        """Some layers, and what stands for each of their parameters that is apart."""
        step = NeuralStep(self.model, self.parts, self.sizes, self.context, layers, logits=self.logits).eval()
        apart = {}
        for name, source in step.sources().items():
            weight = self.program_name[id(source.parameter)]
            if self.weights.is_apart(weight):
                whole = source.start == 0 and source.stop in (None, source.parameter.shape[0])
                rank = step.get_parameter(name).dim()
                apart[name] = Piece(weight, source.start, None if whole else source.stop, rank)
        return step, apart


def _split(builder: _Builder, part_bytes: int, facts: dict[str, str]) -> list[range]:
    """Which layers each part has: as many as fit."""
    count = len(builder.sizes)
    held: set[Piece] = set()
    ranges, start, largest, total = [], 0, 0, 0
    for i in range(count):
        pieces = set(builder.step(range(i, i + 1))[1].values())
        size = sum(builder.weights.shape(piece).stored_bytes(builder.weights.half) for piece in pieces - held)
        if i > start and total + size > part_bytes:
            ranges.append(range(start, i))
            start, total, held = i, 0, set()
            size = sum(builder.weights.shape(piece).stored_bytes(builder.weights.half) for piece in pieces)
        total += size
        held |= pieces
        largest = max(largest, total)
    ranges.append(range(start, count))
    facts |= {"parts": str(len(ranges)), "largest_part_bytes": str(largest)}
    return ranges
