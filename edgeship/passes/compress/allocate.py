"""compress/allocate: choose an encoding for every layer within the bytes there are."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from edgeship.core.encodings import ENCODED_OPS, short_name, without_zeros
from edgeship.core.inventory import WeightOp
from edgeship.core.model import TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.planning import Candidates, held_candidates, sparse_ops, ways_to_store
from edgeship.core.profile import Request
from edgeship.core.units import human_bytes, parse_bytes, rounded_up
from edgeship.errors import GateError, UsageError

if TYPE_CHECKING:
    from edgeship.core.inventory import WeightUse
    from edgeship.core.weights import Encoding

# What a file holds besides weights, at least; where it takes more, the size gate shrinks the budget.
FILE_BYTES = 2_000
OPERATOR_BYTES = 100
# What an operator takes beyond that in any file: Core ML's has a kilobyte for each of MobileNetV3's.
MOST_OPERATOR_BYTES = 1_100


@dataclass(frozen=True)
class AllocateBits(Pass):
    """Choose an encoding for every layer that loses least within the bytes there are (profile auto).

    What each layer loses was measured by compress/sensitivity; the choice is an integer programme, solved with HiGHS.

    Args:
        candidates: (operator, short names of encodings that the runtime holds for it).
        max_bytes: for all encoded weights together.
        points: of the trade-off curve in the report.
        sparse: operators whose pruned weights the runtime stores without their zeros.
    """

    name: ClassVar[str] = "compress/allocate"
    tools: ClassVar[tuple[str, ...]] = ("torch", "scipy")
    settles: ClassVar[str] = "bits"
    after: ClassVar[tuple[str, ...]] = ("compress/prune", "compress/smooth", "compress/sensitivity")
    decided: ClassVar[dict[str, str]] = {"candidates": "--profile"}

    runtime: str = ""
    candidates: Candidates = ()
    max_bytes: int = 0
    points: int = 12
    sparse: tuple[WeightOp, ...] = ()

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Planned for profiles whose weights are ``auto``."""
        if request.choice.weights != "auto":
            return Skip(f"profile {request.profile.name} decides the weights itself")
        return cls(request.runtime, held_candidates(request), _budget(request), sparse=sparse_ops(request))

    def confirm(self, request: Request) -> None:
        """Refuse a budget that is used up before a single weight is stored."""
        if self.points < 2:
            raise UsageError(f"{self.name} needs at least 2 points", fix="leave the option out")
        if request.inventory is None:
            return
        uses = [use for use in request.inventory.weights if use.op in ENCODED_OPS]
        smallest = 0
        for use in uses:
            smallest += min(self._bytes(use, way) for way in ways_to_store(self.candidates, use))
        if smallest > self.max_bytes:
            raise self._too_small(request, smallest)

    def _too_small(self, request: Request, smallest: int) -> GateError:
        """That the smallest encodings, of ``smallest`` bytes, do not fit; the way out has been tried by `_budget`."""
        if "max_bytes" in request.options.get(self.name, {}):
            what = f"no choice of encodings fits {request.runtime} into {self.name}.max_bytes={self.max_bytes}"
            return GateError(what, fix=f"--set {self.name}.max_bytes={smallest} would fit")
        limit = int(request.target.app_memory_bytes.value)
        if request.max_size_bytes is None:
            what = f"no choice of encodings fits {request.runtime} into the {human_bytes(limit)} of an app"
            return GateError(f"{what} on {request.target.name}", fix="choose a smaller model, or a larger target")
        operators = len(request.inventory.ops) if request.inventory else 0
        missing = smallest - self.max_bytes + MOST_OPERATOR_BYTES * operators
        wanted = rounded_up(request.max_size_bytes + missing)
        what = f"no choice of encodings fits {request.runtime} into {human_bytes(request.max_size_bytes)}"
        if _budget(replace(request, max_size_bytes=parse_bytes(wanted))) >= smallest:
            return GateError(what, fix=f"--max-size {wanted} would fit")
        memory = f"nor into the {human_bytes(limit)} of an app on {request.target.name}"
        return GateError(f"{what}, {memory}", fix="choose a smaller model, or a larger target")

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Write the program with ``record.assignment`` and ``record.curve``."""
        from edgeship.compression.allocate import Option, allocate, trade_off
        from edgeship.program.program import TorchProgram

        program = TorchProgram.open(model)
        losses = json.loads((model.path / "losses.json").read_text(encoding="utf-8"))
        pruned = program.record.pruned
        layers: dict[str, list[Option]] = {}
        for use in program.record.inventory.weights:
            if use.name not in losses:
                continue
            layers[use.name] = []
            for way in ways_to_store(self.candidates, use):
                size = self._bytes(use, way, pruned.get(use.name, 0.0))
                layers[use.name].append(Option(way, size, losses[use.name][short_name(way)]))
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

    def _bytes(self, use: WeightUse, encoding: Encoding, sparsity: float = 0.0) -> int:
        """What a weight takes in the runtime's file; compress/quantize will leave zeros out where that is smaller."""
        from edgeship.core.registry import runtimes

        if sparsity and use.op in self.sparse:
            encoding = without_zeros(encoding, use, sparsity)
        return -(-runtimes()[self.runtime].stored_bits(use, encoding, sparsity) // 8)


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
    halves = runtime.float_bits(request.choice) == 16
    others = [use for use in inventory.weights if use.op not in ENCODED_OPS]
    rest = sum(use.elements * use.bits_unencoded(halves=halves) // 8 for use in others)
    limit -= rest
    if request.max_size_bytes is not None:
        graph = FILE_BYTES + OPERATOR_BYTES * len(inventory.ops)
        limit = min(limit, request.max_size_bytes - rest - graph)
    return limit - request.spare_bytes
