"""compress/prune: make weights zero that matter least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from edgeship.core.model import TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import DataRef, Request
from edgeship.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

    from edgeship.compression.hessian import Hessian
    from edgeship.compression.walk import Layer
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
        refit: move the weights that stay to where they make up for those that went: least squares on calibration data,
            one layer after the other, no training (see `edgeship.compression.refit`). Planned where there is data.
        keep: weights, by name, that are left whole.
        data, samples: calibration inputs. measured: how many of them losses are taken on.
    """

    name: ClassVar[str] = "compress/prune"
    tools: ClassVar[tuple[str, ...]] = ("torch", "scipy")
    settles: ClassVar[str] = "zeros"

    sparsity: float = 0.5
    method: Literal["magnitude", "wanda"] = "magnitude"
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    scope: Literal["layer", "global", "measured"] = "layer"
    refit: bool = False
    keep: tuple[str, ...] = ()
    data: DataRef | None = None
    samples: int = 128
    measured: int = 16

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Planned when an option of it is set: nothing is pruned that nobody asked for."""
        if cls.name not in request.options:
            return Skip("not asked for: --set compress/prune.sparsity=0.5")
        return cls(refit=request.calibration is not None, data=request.calibration)

    def confirm(self, request: Request) -> None:
        """Refuse shares that leave nothing, schedules that the pattern fixes, and unknown names."""
        if not 0 < self.sparsity < 1:
            raise UsageError(f"{self.name}.sparsity={self.sparsity:g} is not a share", fix="give one between 0 and 1")
        if self.pattern == "2:4" and (self.scope != "layer" or self.sparsity != 0.5):
            raise UsageError("2:4 takes half of every layer", fix="leave scope and sparsity out")
        if self.scope != "layer" and self.sparsity > MOST:
            raise UsageError(
                f"{self.name}.scope={self.scope} leaves a twentieth of each layer, so {self.sparsity:g} is too much",
                fix=f"give at most {MOST:g}, or leave scope out",
            )
        if self.samples < 1 or self.measured < 1:
            raise UsageError(f"{self.name}: samples and measured must be at least 1", fix="leave them out")
        if (self.method == "wanda" or self.refit) and self.data is None:
            what = "Wanda" if self.method == "wanda" else f"{self.name}.refit"
            raise DataError(f"{what} needs calibration data", fix="add --calibration DATA")
        if request.inventory is not None:
            from edgeship.core.records import suggest

            names = [use.name for use in request.inventory.weights]
            for name in self.keep:
                if name not in names:
                    raise UsageError(f"{self.name}.keep: no weight {name}", fix=suggest(name, names))

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Write the program with its zeros, and the share of each layer in ``record.pruned``."""
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
        masks = {use.name: self._mask(use, scores[use.name], shares[use.name]) for use in uses if shares[use.name] > 0}
        changed = {name: program.weights[name] * mask for name, mask in masks.items()}
        if self.refit:
            changed |= self._refitted(program, masks, ctx)
        pruned = {name: 1 - float((weight != 0).float().mean()) for name, weight in changed.items()}
        loss = self._loss(program, changed)
        words = ", ".join([self.method, self.pattern, self.scope, *(["refitted"] if self.refit else [])])
        note = f"{self.name}: {self.sparsity:.0%}, {words}; noise over signal at the outputs {loss:.2g}"
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
        """How much each number of a weight matters, in the weight's own shape."""
        from edgeship.compression.prune import magnitude_score, wanda_score

        scores = {use.name: magnitude_score(program.weights[use.name]) for use in uses}
        if self.method == "wanda":
            norms = self._norms(program, ctx)
            for use in uses:
                if use.name in norms:
                    scores[use.name] = wanda_score(program.weights[use.name], norms[use.name])
        return scores

    def _batches(self, program: TorchProgram) -> list[dict[str, Any]]:
        from edgeship.data.batches import calibration_batches, generate_batches

        if self.data is None:
            return generate_batches(program.signature, 16, 0)
        return calibration_batches(self.data, program.signature, self.samples)

    def _norms(self, program: TorchProgram, ctx: Context) -> dict[str, torch.Tensor]:
        """The L2 norm of each input channel of each linear layer, over all calibration tokens."""
        from edgeship.compression.walk import walk

        found: dict[str, torch.Tensor] = {}

        def visit(layer: Layer) -> None:
            if layer.use.op == "linear":
                squares = sum(rows.float().reshape(-1, rows.shape[-1]).square().sum(0) for rows in layer.inputs)
                found[program.record.aliases.get(layer.use.name, layer.use.name)] = squares.sqrt()  # type: ignore[union-attr]

        walk(program, self._batches(program), visit, ctx.progress, folder=ctx.folder)
        return found

    def _mask(self, use: WeightUse, score: torch.Tensor, share: float) -> torch.Tensor:
        """True where a weight is kept. The shape of the weight."""
        from edgeship.compression.prune import keep_mask

        row_wise = self.method == "wanda" and use.op == "linear"
        pattern = self.pattern if use.op == "linear" or use.shape[1] % 4 == 0 else "unstructured"
        return keep_mask(score, share, pattern=pattern, per_row=row_wise)

    def _refitted(
        self, program: TorchProgram, masks: Mapping[str, torch.Tensor], ctx: Context
    ) -> dict[str, torch.Tensor]:
        """The pruned weights, each refitted to the inputs that the layers before it make by then.

        Each in its own shape.
        """
        from edgeship.compression.gptq import DRIFT
        from edgeship.compression.refit import REFITTED_OPS, hessian_of_layer, refit_layer
        from edgeship.compression.walk import Replacement, walk

        found: dict[str, torch.Tensor] = {}

        def visit(layer: Layer) -> Replacement | None:
            name = program.record.aliases.get(layer.use.name, layer.use.name)
            if name not in masks:
                return None
            if layer.use.op not in REFITTED_OPS:
                return Replacement(layer.weight * masks[name])
            found[name] = refit_layer(layer, masks[name], hessian_of_layer(layer), drift=DRIFT)
            return Replacement(found[name])

        walk(program, self._batches(program), visit, ctx.progress, reference=True, folder=ctx.folder)
        return found

    def _loss(self, program: TorchProgram, changed: Mapping[str, torch.Tensor]) -> float:
        """What pruning alone costs: noise over signal at the model's outputs. Later steps are measured against it.

        ``changed``: weights in their own shapes.
        """
        import torch

        from edgeship.compression.walk import Operators

        batches = self._batches(program)
        count = min(self.measured, len(batches))
        operators = Operators(program, batches)
        inputs = operators.inputs(index * len(batches) // count for index in range(count))
        with torch.no_grad():
            before = _in_a_row(operators.answers(0, inputs, {}))
            after = _in_a_row(operators.answers(0, inputs, changed))
        return float((after - before).square().sum() / before.square().sum().clamp(min=1e-30))

    def _shares(
        self, program: TorchProgram, uses: list[WeightUse], scores: dict[str, torch.Tensor], ctx: Context
    ) -> dict[str, float]:
        """How much of each layer becomes zero."""
        from edgeship.compression.schedule import global_shares, measured_shares

        if self.scope == "layer":
            return {use.name: self.sparsity for use in uses}
        if self.scope == "global":
            return global_shares(scores, self.sparsity)
        from edgeship.compression.refit import REFITTED_OPS, hessian_of_layer, refit_layer

        known = {use.name: use for use in uses}
        hessians: dict[str, Hessian] = {}

        def pruned(name: str, share: float, layer: Layer | None) -> torch.Tensor:
            """The weight as it would be pruned, in its own shape."""
            mask = self._mask(known[name], scores[name], share)
            if not self.refit or layer is None or layer.use.op not in REFITTED_OPS:
                return program.weights[name].float() * mask
            if name not in hessians:
                # One layer's at a time: all of them together are larger than the model.
                hessians.clear()
                hessians[name] = hessian_of_layer(layer)
            return refit_layer(layer, mask, hessians[name])

        sizes = {name: score.numel() for name, score in scores.items()}
        batches = self._batches(program)
        return measured_shares(program, sizes, self.sparsity, pruned, batches, self.measured, ctx.progress)


def _in_a_row(answers: list[list[torch.Tensor]]) -> torch.Tensor:
    """Every number of every output of every sample, ``[numbers]`` in float64."""
    import torch

    return torch.cat([output.double().flatten() for outputs in answers for output in outputs])
