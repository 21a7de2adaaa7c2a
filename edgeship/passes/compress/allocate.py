"""compress/allocate: choose an encoding for every layer within the bytes there are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from edgeship.core.encodings import ENCODED_OPS, encoding_named, fitted, short_name
from edgeship.core.model import TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import DataRef, Request
from edgeship.errors import EncodingError, GateError, UsageError

if TYPE_CHECKING:
    from edgeship.core.inventory import WeightOp, WeightUse
    from edgeship.core.weights import EncodedTensor, Encoding
    from edgeship.program.program import TorchProgram

# What a file holds besides weights, at least; where it takes more, the size gate shrinks the budget.
FILE_BYTES = 2_000
OPERATOR_BYTES = 100


@dataclass(frozen=True)
class AllocateBits(Pass):
    """Choose an encoding for every layer that loses least within the bytes there are (profile auto).

    Losses are measured one layer at a time; the choice is an integer programme, solved with HiGHS.

    Args:
        candidates: (operator, short names of encodings that the runtime holds for it).
        max_bytes: for all encoded weights together.
        data, samples: inputs to measure losses on; drawn from ``seed`` when not given.
        points: of the trade-off curve in the report.
    """

    name: ClassVar[str] = "compress/allocate"
    tools: ClassVar[tuple[str, ...]] = ("torch", "scipy")
    settles: ClassVar[str] = "bits"
    after: ClassVar[tuple[str, ...]] = ("compress/prune", "compress/smooth")

    runtime: str = ""
    candidates: tuple[tuple[str, tuple[str, ...]], ...] = ()
    max_bytes: int = 0
    data: DataRef | None = None
    samples: int = 32
    seed: int = 0
    points: int = 12

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Planned for profiles whose weights are ``auto``."""
        from edgeship.core.registry import runtimes

        choice = request.choice
        if choice.weights != "auto":
            return Skip(f"profile {request.profile.name} decides the weights itself")
        runtime = runtimes()[request.runtime]
        rows = []
        for op in ENCODED_OPS:
            held = [
                name for name in choice.candidates if not runtime.holds(op, encoding_named(name), choice.activations)
            ]
            rows.append((op, tuple(held)))
        return cls(request.runtime, tuple(rows), _budget(request), request.calibration)

    def confirm(self, request: Request) -> None:
        """Refuse a budget that is used up before a single weight is stored."""
        if self.samples < 1 or self.points < 2:
            raise UsageError(f"{self.name} needs at least 1 sample and 2 points", fix="leave the options out")
        if request.inventory is None:
            return
        smallest = sum(min(option[1] for option in self._sized(use)) for use in self._uses(request.inventory.weights))
        if smallest > self.max_bytes:
            from edgeship.core.units import human_bytes

            rest = (request.max_size_bytes or self.max_bytes) - self.max_bytes
            raise GateError(
                f"no choice of encodings fits {request.runtime} into {human_bytes(self.max_bytes + max(rest, 0))}",
                fix=f"the smallest takes about {human_bytes(smallest + max(rest, 0))}",
            )

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Write the program with ``record.assignment`` and ``record.curve``."""
        from edgeship.compression.allocate import allocate, trade_off
        from edgeship.compression.sensitivity import measure_sensitivity
        from edgeship.data.batches import generate_batches, load_batches
        from edgeship.program.program import TorchProgram

        program = TorchProgram.open(model)
        batches = (
            generate_batches(program.signature, min(self.samples, 16), self.seed)
            if self.data is None
            else load_batches(self.data.reference, program.signature, self.samples)
        )
        uses = [use for use in self._uses(program.record.inventory.weights) if use.name not in program.record.aliases]
        sizes = {use.name: self._sized(use, program.record.pruned.get(use.name, 0.0)) for use in uses}
        measured = measure_sensitivity(
            program,
            ((use.name, (_encoded(program, use, encoding) for encoding, _ in sizes[use.name])) for use in uses),
            batches,
            lambda name: ctx.progress([use.name for use in uses].index(name), len(uses), name),
        )
        layers = {
            name: [replace(option, bytes=size) for option, (_, size) in zip(options, sizes[name], strict=True)]
            for name, options in measured.items()
        }
        found = allocate(layers, self.max_bytes)
        curve = tuple((item.bytes, item.loss) for item in trade_off(layers, self.points))
        record = replace(
            program.record,
            assignment={name: option.encoding for name, option in found.chosen.items()},
            curve=tuple(sorted({*curve, (found.bytes, found.loss)})),
            history=(*program.record.history, f"{self.name}: {found.bytes} of {self.max_bytes} bytes"),
        )
        replace(program, record=record).save(ctx.folder / "program")
        return TorchModel(ctx.folder / "program", model.signature)

    def _uses(self, weights: tuple[WeightUse, ...]) -> list[WeightUse]:
        return [use for use in weights if use.op in ENCODED_OPS]

    def _sized(self, use: WeightUse, sparsity: float = 0.0) -> list[tuple[Encoding, int]]:
        """The ways this weight can be stored, each once, with its bytes in the runtime's file."""
        from edgeship.core.registry import runtimes

        runtime = runtimes()[self.runtime]
        op: WeightOp = use.op
        found: dict[str, tuple[Encoding, int]] = {}
        for text in dict(self.candidates).get(op, ()):
            encoding = fitted(encoding_named(text), use)
            found[short_name(encoding)] = (encoding, -(-runtime.stored_bits(use, encoding, sparsity) // 8))
        if not found:
            raise EncodingError(
                f"{runtime.title} holds none of the candidates for {op} ({use.name})", fix="choose another profile"
            )
        return list(found.values())


def _encoded(program: TorchProgram, use: WeightUse, encoding: Encoding) -> EncodedTensor:
    """The weight as rounding without data stores it: close to what quantize will make of it."""
    from edgeship.compression.encode import Encoder

    # Clipping helps linear layers and costs convolutions.
    method = "clipped" if use.op in ("linear", "embedding") else "nearest"
    return Encoder(program, {use.name: encoding}, method).encode_alone(use)


def _budget(request: Request) -> int:
    """Bytes for encoded weights: the file limit less the graph and the other weights, or the app's memory limit less
    activations and engine, whichever is less."""
    from edgeship.core.memory import predict
    from edgeship.core.registry import runtimes

    inventory = request.inventory
    if inventory is None:
        return 0
    runtime = runtimes()[request.runtime]
    footprint = predict(inventory, runtime, request.choice)
    limit = int(request.target.app_memory_bytes.value) - footprint.activations - footprint.runtime
    width = 2 if request.runtime in ("coreml", "coreai") else 4
    rest = width * sum(use.elements for use in inventory.weights if use.op not in ENCODED_OPS)
    limit -= rest
    if request.max_size_bytes is not None:
        graph = FILE_BYTES + OPERATOR_BYTES * len(inventory.ops)
        limit = min(limit, request.max_size_bytes - rest - graph)
    return limit - request.spare_bytes
