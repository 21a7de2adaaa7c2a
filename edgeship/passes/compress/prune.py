"""compress/prune: make weights zero that matter least."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from edgeship.core.model import TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import DataRef, Request
from edgeship.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

    from edgeship.core.inventory import WeightUse
    from edgeship.program.program import TorchProgram

PRUNABLE = ("linear", "conv", "conv_transpose")
# The largest share that a schedule over all layers can take: none is emptied.
MOST = 0.95


@dataclass(frozen=True)
class PruneWeights(Pass):
    """Make the weights zero that matter least, so that a runtime with sparse storage leaves them out.

    Planned only when asked for: ``--set compress/prune.sparsity=0.5``.

    Args:
        sparsity: share of the numbers of all linear layers and convolutions that become zero.
        method: ``magnitude`` (Han et al. 2015) or ``wanda`` (Sun et al. 2023: magnitude times the norm of the input
            channel on calibration data; linear layers only, convolutions go by magnitude).
        pattern: ``unstructured``, or ``2:4``: two of every four consecutive input channels.
        scope: ``layer`` takes the same share of each; ``global`` one threshold over all, relative to each layer's mean;
            ``measured`` takes the share of each layer that the outputs bear best (calibration data, or generated).
        keep: weights, by name, that are left whole.
    """

    name: ClassVar[str] = "compress/prune"
    tools: ClassVar[tuple[str, ...]] = ("torch", "scipy")
    settles: ClassVar[str] = "zeros"

    sparsity: float = 0.5
    method: Literal["magnitude", "wanda"] = "magnitude"
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    scope: Literal["layer", "global", "measured"] = "layer"
    keep: tuple[str, ...] = ()
    data: DataRef | None = None
    samples: int = 64

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Planned when an option of it is set: nothing is pruned that nobody asked for."""
        if cls.name not in request.options:
            return Skip("not asked for: --set compress/prune.sparsity=0.5")
        return cls(data=request.calibration)

    def confirm(self, request: Request) -> None:
        """Refuse shares that leave nothing, schedules that the pattern fixes, and unknown names."""
        if not 0 < self.sparsity < 1:
            raise UsageError(f"{self.name}.sparsity={self.sparsity:g} is no share", fix="give one between 0 and 1")
        if self.pattern == "2:4" and (self.scope != "layer" or self.sparsity != 0.5):
            raise UsageError("2:4 takes half of every layer", fix="leave scope and sparsity out")
        if self.scope != "layer" and self.sparsity > MOST:
            raise UsageError(
                f"{self.name}.scope={self.scope} leaves a twentieth of each layer, so {self.sparsity:g} is too much",
                fix=f"give at most {MOST:g}, or leave scope out",
            )
        if self.samples < 1:
            raise UsageError(f"{self.name}.samples must be at least 1", fix="leave it out for 64")
        if self.method == "wanda" and self.data is None:
            raise DataError("Wanda needs calibration data", fix="add --calibration DATA")
        if request.inventory is not None:
            from edgeship.core.records import suggest

            names = [use.name for use in request.inventory.weights]
            for name in self.keep:
                if name not in names:
                    raise UsageError(f"{self.name}.keep: no weight {name}", fix=suggest(name, names))

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Write the program with its zeros, and the share of each layer in ``record.pruned``."""
        from edgeship.compression.prune import keep_mask
        from edgeship.program.program import TorchProgram

        program = TorchProgram.open(model)
        uses = [
            use
            for use in program.record.inventory.weights
            if use.op in PRUNABLE and use.name not in self.keep and use.name not in program.record.aliases
        ]
        if not uses:
            raise UsageError("no weight is left to prune", fix="leave keep out")
        scores = self._scores(program, uses, ctx)
        shares = self._shares(program, uses, scores, ctx)
        changed: dict[str, torch.Tensor] = {}
        pruned: dict[str, float] = {}
        for use in uses:
            if shares[use.name] <= 0:
                continue
            row_wise = self.method == "wanda" and use.op == "linear"
            pattern = self.pattern if use.op == "linear" or use.shape[1] % 4 == 0 else "unstructured"
            keep = keep_mask(scores[use.name], shares[use.name], pattern=pattern, per_row=row_wise)
            weight = program.weights[use.name]
            changed[use.name] = weight * keep
            pruned[use.name] = 1 - float((changed[use.name] != 0).float().mean())
        note = f"{self.name}: {self.sparsity:.0%}, {self.method}, {self.pattern}, {self.scope}"
        record = replace(program.record, pruned=pruned, history=(*program.record.history, note))
        replace(program, record=record, weights={**program.weights, **changed}).save(ctx.folder / "program")
        return TorchModel(ctx.folder / "program", model.signature)

    def ensures(self, output: TorchModel, **inputs: object) -> None:
        """The zeros are there: the share over all prunable weights is what was asked for."""
        from edgeship.errors import LoweringError
        from edgeship.program.program import read_record

        record = read_record(output)
        sizes = {
            use.name: use.elements
            for use in record.inventory.weights
            if use.op in PRUNABLE and use.name not in self.keep and use.name not in record.aliases
        }
        share = sum(size * record.pruned.get(name, 0.0) for name, size in sizes.items()) / sum(sizes.values())
        if share < self.sparsity - 0.01:
            raise LoweringError(f"{share:.1%} of the weights became zero, {self.sparsity:.1%} were asked for")

    def _scores(self, program: TorchProgram, uses: list[WeightUse], ctx: Context) -> dict[str, torch.Tensor]:
        from edgeship.compression.prune import magnitude_score, wanda_score

        scores = {use.name: magnitude_score(program.weights[use.name]) for use in uses}
        if self.method == "wanda":
            norms = self._norms(program, ctx)
            for use in uses:
                if use.name in norms:
                    scores[use.name] = wanda_score(program.weights[use.name], norms[use.name])
        return scores

    def _norms(self, program: TorchProgram, ctx: Context) -> dict[str, torch.Tensor]:
        """The L2 norm of each input channel of each linear layer, over all calibration tokens."""
        from edgeship.compression.walk import Layer, walk
        from edgeship.data.batches import load_batches

        assert self.data is not None
        found: dict[str, torch.Tensor] = {}

        def visit(layer: Layer) -> None:
            if layer.use.op == "linear":
                squares = sum(rows.float().reshape(-1, rows.shape[-1]).square().sum(0) for rows in layer.inputs)
                found[program.record.aliases.get(layer.use.name, layer.use.name)] = squares.sqrt()  # type: ignore[union-attr]

        walk(program, load_batches(self.data.reference, program.signature, self.samples), visit, ctx.progress)
        return found

    def _shares(
        self, program: TorchProgram, uses: list[WeightUse], scores: dict[str, torch.Tensor], ctx: Context
    ) -> dict[str, float]:
        """How much of each layer becomes zero."""
        from edgeship.compression.schedule import global_shares, measured_shares

        if self.scope == "layer":
            return {use.name: self.sparsity for use in uses}
        if self.scope == "global":
            return global_shares(scores, self.sparsity)
        from edgeship.data.batches import generate_batches, load_batches

        batches = (
            generate_batches(program.signature, 16, 0)
            if self.data is None
            else load_batches(self.data.reference, program.signature, self.samples)
        )
        return measured_shares(program, scores, self.sparsity, batches, ctx.progress)
