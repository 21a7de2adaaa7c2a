"""compress/finetune: quantization-aware training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgeship.core.artifact import script_digest
from edgeship.core.encodings import ENCODED_OPS, encoding_named, fitted
from edgeship.core.model import TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.planning import planned_encoding
from edgeship.core.profile import DataRef, Request
from edgeship.core.weights import Affine
from edgeship.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

    from edgeship.program.program import TorchProgram


@dataclass(frozen=True)
class FinetuneWeights(Pass):
    """Train the weights for the integers that they will be stored in (quantization-aware training).

    Gradients pass straight through the rounding. Planned when one of its options is set:
    ``--set compress/finetune.steps=200``.

    Args:
        steps: updates of Adam. lr: learning rate at first; it falls to zero. batch: samples an update.
        loss: ``file.py:function``, called with (module, batch) and answering with the loss to lower; batches hold the
            inputs by name, and ``label`` where the data has labels. Without it the float model is the teacher.
        weights: short name of the encoding to train for. clip: ranges by squared error, as ``clipped`` chooses them.
        data, samples: training inputs. seed: of their order.
        loss_digest: of the file that the loss lies in.
        embeddings: short name of the encoding of tables of which rows are looked up; as ``weights`` when empty.
    """

    name: ClassVar[str] = "compress/finetune"
    tools: ClassVar[tuple[str, ...]] = ("torch",)
    settles: ClassVar[str] = "training"
    after: ClassVar[tuple[str, ...]] = ("compress/allocate", "compress/prune", "compress/smooth")

    steps: int = 200
    lr: float = 1e-4
    batch: int = 8
    loss: str = ""
    weights: str = "int8"
    clip: bool = False
    data: DataRef | None = None
    samples: int = 500
    seed: int = 0
    loss_digest: str = ""
    embeddings: str = ""

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Planned when asked for."""
        given = request.options.get(cls.name)
        if given is None:
            return Skip("not asked for: --set compress/finetune.steps=200")
        weights = planned_encoding(request)
        digest = script_digest(given.get("loss", ""))
        # As compress/quantize will round them: what auto chose, and fewer than 8 bits, in clipped ranges.
        clip = encoding_named(weights).bits < 8 or request.choice.weights == "auto"
        tables = request.choice.embeddings
        return cls(weights=weights, clip=clip, data=request.calibration, loss_digest=digest, embeddings=tables)

    def confirm(self, request: Request) -> None:
        """Refuse to train on nothing, and with a loss that cannot be loaded."""
        if self.data is None:
            raise DataError("training needs data", fix="add --calibration DATA")
        if self.steps < 1 or self.batch < 1 or self.samples < 1 or self.lr <= 0:
            raise UsageError(f"{self.name} needs steps, batch, samples and lr above zero", fix="leave them out")
        if not isinstance(encoding_named(self.weights), Affine):
            raise UsageError(f"training is for integer weights, not {self.weights}", fix="leave it out")
        if self.loss and not self.loss.rpartition(":")[2].isidentifier():
            raise UsageError(f"{self.name}.loss={self.loss} names no function", fix="give path/to/file.py:function")
        script = Path(self.loss.rpartition(":")[0])
        if script.suffix == ".py" and not script.is_file():
            raise UsageError(f"{script} does not exist", fix="give path/to/file.py:function")

    def run(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Write the program with trained weights."""
        from edgeship.compression.finetune import finetune
        from edgeship.data.batches import load_samples
        from edgeship.data.functions import load_function
        from edgeship.program.program import TorchProgram
        from edgeship.program.stored import Overlay

        assert self.data is not None
        program = TorchProgram.open(model)
        samples = load_samples(self.data.reference, program.signature, self.samples)
        batches: list[dict[str, Any]] = [dict(batch) for batch in samples.inputs]
        if samples.labels is not None:
            for batch, label in zip(batches, samples.labels, strict=True):
                batch["label"] = label
        masks = {name: program.weights[name] != 0 for name in program.record.pruned}
        trained: dict[str, torch.Tensor] = finetune(
            program,
            self._grids(program),
            batches,
            steps=self.steps,
            lr=self.lr,
            samples=self.batch,
            seed=self.seed,
            loss=load_function(self.loss) if self.loss else None,
            clip=self.clip,
            masks=masks,
            progress=ctx.progress,
        )
        note = f"{self.name}: {self.steps} steps on {len(batches)} samples, {self.loss or 'distillation'}"
        record = replace(program.record, history=(*program.record.history, note))
        replace(program, record=record, weights=Overlay(program.weights, trained)).save(ctx.folder / "program")
        return TorchModel(ctx.folder / "program", model.signature)

    def _grids(self, program: TorchProgram) -> dict[str, Affine]:
        """The grid of each weight that becomes integers."""
        found = {}
        for use in program.record.inventory.weights:
            if use.op not in ENCODED_OPS or use.name in program.record.aliases:
                continue
            text = self.embeddings if self.embeddings and (use.looked_up or use.op == "embedding") else self.weights
            encoding = program.record.assignment.get(use.name) or fitted(encoding_named(text), use)
            if isinstance(encoding, Affine):
                found[use.name] = encoding
        return found
