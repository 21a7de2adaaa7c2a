"""compress/calibrate: decide static integer grids for activations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from edgeship.core.forms import STATIC_MODES
from edgeship.core.model import Signature, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import DataRef, Request
from edgeship.errors import LoweringError, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeship.compression.islands import Mixed
    from edgeship.core.weights import ActivationEncoding
    from edgeship.program.program import TorchProgram

    Batch = Mapping[str, npt.NDArray[Any]]

# Names in a sentence of the report.
SHOWN = 5
# From which share of the arithmetic without a grid borders between floats and integers cost more than integers save: a
# small YOLO with 12 of its 18 convolutions in float took 2.1 ms so on ONNX Runtime, and 1.6 ms all in float.
TOO_MIXED = 1 / 3


@dataclass(frozen=True)
class CalibrateActivations(Pass):
    """Run the model on calibration data and give every activation a static int8 or int16 grid, where one can hold it.

    Parts of very different scale keep their own grids, and what joins them stays in float; so does what costs the
    outputs too much. Where a runtime cannot have that in float, all grids are in 16 bits.

    Args:
        bits: 8 (asymmetric) or 16 (symmetric).
        method: ``minmax``, ``percentile``, ``mse`` or ``entropy``; 16 bits have room for outliers, 8 bits clip them.
            ``given``: the source's own grids, and what follows from them; nothing is measured.
        samples: how many inputs at most.
        data: where they come from. Drawn from ``seed`` when not given; then 16-bit grids reach for images of 0 to 255
            too, as far as that costs the drawn ones little.
        float_products: whether the runtime computes operators with integer weights in float beside static ones.
        half_scales: the source's scales go to the float16 grid, which is what the runtime computes with.
        centred: the runtime's 16-bit grids have zero point 0; the source's others stay in float.
        clips_apart: the runtime does not clip inside the layer before (`edgeship.program.activations.spread_grids`).
        quickest: grids are for speed alone: where a third of the arithmetic cannot have them, there are none.
    """

    name: ClassVar[str] = "compress/calibrate"
    tools: ClassVar[tuple[str, ...]] = ("torch",)
    settles: ClassVar[str] = "activations"
    after: ClassVar[tuple[str, ...]] = ("compress/quantize",)
    decided: ClassVar[dict[str, str]] = {
        "float_products": "--runtime",
        "half_scales": "--runtime",
        "centred": "--runtime",
        "clips_apart": "--runtime",
        "quickest": "--profile",
    }

    bits: int = 16
    method: Literal["minmax", "percentile", "mse", "entropy", "given"] = "minmax"
    samples: int = 128
    data: DataRef | None = None
    seed: int = 0
    float_products: bool = True
    half_scales: bool = False
    centred: bool = False
    clips_apart: bool = False
    quickest: bool = False

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Configured when the profile wants static integer activations for this runtime."""
        from edgeship.core.registry import runtimes

        given = request.inventory.activations if request.inventory is not None else ""
        if given in STATIC_MODES:
            return cls._of_source(request)
        activations = request.choice.activations
        if activations not in STATIC_MODES:
            return Skip(f"profile {request.profile.name} keeps activations {activations}")
        bits = int(activations.removeprefix("int"))
        products = runtimes()[request.runtime].engine.float_products
        method: Literal["mse", "minmax"] = "mse" if bits == 8 else "minmax"
        return cls(bits, method, data=request.calibration, float_products=products, quickest=request.choice.quickest)

    @classmethod
    def _of_source(cls, request: Request) -> Self:
        """The source's own grids, as far as the runtime computes with them."""
        from edgeship.core.registry import runtimes

        runtime = runtimes()[request.runtime]
        return cls(
            16 if "int16" in runtime.engine.computes else 8,
            "given",
            float_products=runtime.engine.float_products,
            half_scales=runtime.format.float_bits == 16,
            centred=runtime.engine.centred_int16,
            clips_apart=not runtime.engine.clips_inside,
        )

    def confirm(self, request: Request) -> None:
        """Refuse to calibrate a decoder's step on caches drawn at random: they are nothing like real ones."""
        if self.data is None and request.load.get("part") == "decoder":
            raise UsageError(
                f"integer activations of a decoder for {request.runtime} need recorded caches as calibration data",
                fix="record them (docs/language-models.md) and give --calibration FILE.npz, or leave the runtime out",
            )

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Write the program in its static form, with ``record.activations`` set. Raises `DataError` for unfit data."""
        from edgeship.compression.islands import ROOM_DB, WANTED_DB
        from edgeship.program.program import REMARK, TorchProgram

        if self.samples < 1:
            raise UsageError("compress/calibrate.samples must be at least 1", fix="leave it out for 128")
        loaded = TorchProgram.open(model)
        if self.method == "given":
            return self._as_given(loaded, ctx)
        static, found, origin = self._decide(loaded, self.bits, ctx)
        bits, remarks = self.bits, []
        if bits == 8 and not self.float_products and found.worst_db < WANTED_DB[8] - ROOM_DB:
            wide = self._decide(loaded, 16, ctx)
            if wide[1].worst_db > found.worst_db:
                remarks.append(
                    f"8-bit activations keep {found.worst_db:.0f} dB of {found.worst}: all have 16 bits instead"
                )
                (static, found, origin), bits = wide, 16
        share = _share_in_float(static, found.floats)
        count = len(found.activations) + len(found.floats)
        if self.quickest and share >= TOO_MIXED:
            remarks.append(
                f"activations stay in float: {len(found.floats)} of {count} have to, with {share:.0%} of the "
                "arithmetic, and with borders around them the others would save nothing"
            )
            static, found = loaded, replace(found, activations={}, floats=())
        if found.floats:
            names = ", ".join(found.floats[:SHOWN]) + (" ..." if len(found.floats) > SHOWN else "")
            remarks.append(
                f"{len(found.floats)} of {count} activations stay in float, one grid does not hold them: {names}"
            )
        method = self.method if bits == self.bits else "minmax"
        note = f"{self.name}: int{bits} activations, {method} of {origin}"
        notes = [f"{REMARK}{self.name}: {remark}" for remark in remarks]
        record = replace(static.record, activations=found.activations, history=(*static.record.history, note, *notes))
        replace(static, record=record).save(ctx.folder / "program")
        return TorchModel(ctx.folder / "program", static.signature)

    def _as_given(self, loaded: TorchProgram, ctx: Context) -> TorchModel:
        """The program in its static form, with the source's grids on the nodes that they were on."""
        from edgeship.compat.torch import replaced
        from edgeship.program.activations import insert_pairs, spread_grids, take_pairs
        from edgeship.program.inventory import take_inventory
        from edgeship.program.program import REMARK
        from edgeship.program.rewrites import for_static_activations

        paired = replace(loaded, held=insert_pairs(loaded.exported, loaded.activations))
        static = for_static_activations(paired, max(grid.bits for grid in loaded.activations.values()))
        exported = replaced(
            static.exported,
            graph_module=copy.deepcopy(static.exported.graph_module),
            graph_signature=copy.deepcopy(static.exported.graph_signature),
        )
        grids = spread_grids(exported, take_pairs(exported), clips=not self.clips_apart)
        there = len(grids)
        grids = {name: grid for name, grid in grids.items() if self._holds(grid)}
        if self.half_scales:
            grids = {name: _half(grid) for name, grid in grids.items()}
        note = f"{self.name}: {len(grids)} activations on the grids of the source"
        if len(grids) < there:
            why = "16 bits" + (" with another zero point than 0" if self.centred else "")
            note = f"{REMARK}{self.name}: {there - len(grids)} of {there} grids of the source have {why}: float here"
        record = replace(
            static.record,
            inventory=take_inventory(exported),
            activations=grids,
            history=(*static.record.history, note),
        )
        replace(static, held=exported, record=record).save(ctx.folder / "program")
        return TorchModel(ctx.folder / "program", static.signature)

    def _holds(self, grid: ActivationEncoding) -> bool:
        return grid.bits <= self.bits and not (self.centred and grid.bits == 16 and grid.zero_point)

    def _decide(self, loaded: TorchProgram, bits: int, ctx: Context) -> tuple[TorchProgram, Mixed, str]:
        """The program in its static form for grids of ``bits``, the grids, and where the samples came from."""
        from edgeship.compression.islands import decide_mixed
        from edgeship.data.batches import calibration_batches
        from edgeship.program.rewrites import for_static_activations

        static = for_static_activations(loaded, bits)
        batches = calibration_batches(self.data, static.signature, self.samples, self.seed)
        probes = _as_images(static.signature, batches) if self.data is None and bits == 16 else []
        found = decide_mixed(
            static,
            batches,
            bits=bits,
            method=self.method if bits == self.bits else "minmax",
            products=self.float_products,
            probes=probes,
            progress=lambda done, total: ctx.progress(done, total, "calibrating"),
        )
        return static, found, f"{len(batches)} samples" if self.data else f"{len(batches)} generated samples"

    def ensures(self, output: TorchModel, **inputs: object) -> None:
        """Some activation has a grid, unless none could hold any."""
        from edgeship.program.program import REMARK, read_record

        record = read_record(output)
        if not record.activations and not record.history[-1].startswith(REMARK):
            raise LoweringError("no activation of the model can be quantized", fix="use --profile exact")


def _share_in_float(program: TorchProgram, floats: Sequence[str]) -> float:
    """Of a program's multiply-accumulates, the share of operators that read or answer what has no grid."""
    macs = {cost.name: cost.macs for cost in program.record.inventory.ops}
    without, total = set(floats), 0
    for node in program.exported.graph.nodes:
        if node.name in without or any(item.name in without for item in node.all_input_nodes):
            total += macs.get(node.name, 0)
    return total / max(program.record.inventory.macs, 1)


def _half(grid: ActivationEncoding) -> ActivationEncoding:
    import numpy as np

    return replace(grid, scale=float(np.float16(grid.scale)))


def _as_images(signature: Signature, batches: Sequence[Batch]) -> list[Batch]:
    """The first samples with their floats of unknown range as large as pixels of 0 to 255, and zero."""
    import numpy as np

    floats = {spec.name for spec in signature.inputs if spec.is_float and spec.low is None}
    if not floats:
        return []

    def with_floats(batch: Batch, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Batch:
        """``batch`` with ``change`` made to its float inputs; shapes stay."""
        return {name: change(value).astype(value.dtype) if name in floats else value for name, value in batch.items()}

    random = np.random.default_rng(0)
    return [
        with_floats(batches[0], np.zeros_like),
        *(with_floats(batch, lambda value: np.minimum(np.abs(90 * value), 255)) for batch in batches[:2]),
        *(with_floats(batch, lambda value: random.uniform(0, 255, value.shape)) for batch in batches[2:4]),
    ]
