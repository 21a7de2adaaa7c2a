"""compress/smooth: move scales between layers so that quantization loses less."""

from __future__ import annotations

from collections import ChainMap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from edgeship.core.encodings import encoding_named, fitted
from edgeship.core.forms import STATIC_MODES
from edgeship.core.model import TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.planning import calibration_tokens, planned_encoding
from edgeship.core.profile import DataRef, Request
from edgeship.core.weights import Affine
from edgeship.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

    from edgeship.compression.folds import Fold
    from edgeship.compression.walk import Layer
    from edgeship.program.program import TorchProgram


@dataclass(frozen=True)
class SmoothScales(Pass):
    """Scale input channels up in one layer and down in the one before, so that rounding costs the outputs less.

    The float model answers the same. Planned for ``--set compress/quantize.method=awq``, or when one of its own options
    is set.

    Args:
        method: ``awq`` (Lin et al. 2023) enlarges weights that carry much, for low-bit weights; ``smoothquant`` (Xiao
            et al. 2022) moves outliers of activations into the weights, for static 8-bit activations.
        alpha: for ``smoothquant``: 0 leaves all range in the activations, 1 moves all of it into the weights.
        weights: for ``awq``: short name of the encoding that the weights will get.
        data, samples: calibration inputs, at most so many.
        tokens: of a language model's text, in place of ``samples``.
    """

    name: ClassVar[str] = "compress/smooth"
    tools: ClassVar[tuple[str, ...]] = ("torch",)
    settles: ClassVar[str] = "scales"
    after: ClassVar[tuple[str, ...]] = ("compress/prune",)

    method: Literal["awq", "smoothquant"] = "awq"
    alpha: float = 0.5
    weights: str = "int8"
    data: DataRef | None = None
    samples: int = 128
    tokens: int | None = None

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Planned when asked for."""
        awq = request.options.get("compress/quantize", {}).get("method") == "awq"
        if not awq and cls.name not in request.options:
            return Skip("not asked for: --set compress/smooth.method=smoothquant")
        static = request.choice.activations in STATIC_MODES
        method: Literal["awq", "smoothquant"] = "smoothquant" if static and not awq else "awq"
        return cls(method, weights=planned_encoding(request), data=request.calibration, tokens=_tokens(request))

    def confirm(self, request: Request) -> None:
        """Refuse to work without data, and scales that are not for integers."""
        if self.data is None:
            raise DataError(f"{self.method} needs calibration data", fix="add --calibration DATA")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"{self.name}.alpha={self.alpha:g} is not a share", fix="give one from 0 to 1")
        if not isinstance(encoding_named(self.weights), Affine):
            raise UsageError(f"{self.method} is for integer weights, not {self.weights}", fix="leave it out")

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Write the program with its weights scaled."""
        from edgeship.compression.folds import apply_fold, find_folds
        from edgeship.compression.walk import walk
        from edgeship.data.batches import calibration_batches
        from edgeship.program.program import TorchProgram
        from edgeship.program.stored import Overlay

        assert self.data is not None
        program = TorchProgram.open(model)
        folds = find_folds(program)
        first = {fold.consumers[0][1]: fold for fold in folds}
        scales: dict[str, torch.Tensor] = {}

        def visit(layer: Layer) -> None:
            fold = first.get(layer.use.name)
            if fold is not None:
                scales[fold.producer] = self._scale(program, fold, layer)

        window = program.signature.inputs[0].shape[-1] if program.record.decoder is not None else 0
        count = max(1, self.tokens // window) if window and self.tokens is not None else self.samples
        batches = calibration_batches(self.data, program.signature, count)
        walk(program, batches, visit, ctx.progress, folder=ctx.folder)
        changed: dict[str, torch.Tensor] = {}
        for fold in folds:
            if fold.producer in scales:
                changed.update(apply_fold(ChainMap(changed, dict(program.weights)), fold, scales[fold.producer]))
        note = f"{self.name}: {self.method}, {len(scales)} places"
        record = replace(program.record, history=(*program.record.history, note))
        replace(program, record=record, weights=Overlay(program.weights, changed)).save(ctx.folder / "program")
        return TorchModel(ctx.folder / "program", model.signature)

    def _scale(self, program: TorchProgram, fold: Fold, layer: Layer) -> torch.Tensor:
        """One number for each input channel of the layer: [in]."""
        import torch

        from edgeship.compression.awq import search_scales
        from edgeship.compression.smoothquant import smooth_scales

        weights = [program.weights[name].float() for _, name in fold.consumers]
        if self.method == "awq":
            encoding = fitted(encoding_named(self.weights), layer.use)
            assert isinstance(encoding, Affine)
            return search_scales(weights, layer.inputs, encoding, channels=fold.channels, name=layer.use.name)
        largest = torch.stack([rows.abs().reshape(-1, rows.shape[-1]).amax(0) for rows in layer.inputs]).amax(0)
        return smooth_scales(largest, weights, self.alpha, channels=fold.channels)


def _tokens(request: Request) -> int | None:
    """The budget of compress/quantize: both look at the same text."""
    given: int | None = request.options.get("compress/quantize", {}).get("tokens")
    return given or calibration_tokens(request)
