"""load/weights: a safetensors file, or a pickle of tensors only, into a factory's module."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgeship.core.model import Source, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import DataRef, Request
from edgeship.data.specs import parse_inputs
from edgeship.errors import SourceError, UsageError, WeightsError

if TYPE_CHECKING:
    from pathlib import Path

    import torch


@dataclass(frozen=True)
class LoadWeights(Pass):
    """Load weights from safetensors (or a pickle of tensors, without running code) into a factory's module."""

    name: ClassVar[str] = "load/weights"
    tools: ClassVar[tuple[str, ...]] = ("torch", "safetensors")

    factory: DataRef = field(default_factory=lambda: DataRef("", ""))
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Takes ``.safetensors``, ``.pt``, ``.pth``, ``.th`` and ``.bin`` with ``--factory``."""
        from edgeship.core.artifact import script_digest

        if request.source.form not in ("safetensors", "pickle"):
            return Skip(f"{request.source.reference} is not a weights file")
        load = request.load
        factory = DataRef(str(load["factory"]), script_digest(str(load["factory"])))
        return cls(factory, tuple(load["inputs"]), tuple(load["outputs"]), dict(load["notes"]))

    def confirm(self, request: Request) -> None:
        """Ask for inputs before anything is imported."""
        if not self.inputs:
            raise UsageError("weights do not say what the inputs are", fix="add --input name:f32[1,3,224,224]")
        parse_inputs(self.inputs)

    def run(self, model: Source, ctx: Context) -> TorchModel:
        """Read the weights, put them into the module strictly, export it."""
        from edgeship.data.specs import example_tensors, with_notes
        from edgeship.frontends.factory import call_factory
        from edgeship.frontends.reads import recorded_reads
        from edgeship.program.export import make_program

        state = read_weights(model.path)
        with recorded_reads() as reads:
            module = call_factory(self.factory.reference)
        fill(module, state, model.path)
        specs = with_notes(parse_inputs(self.inputs), self.notes)
        note = f"{self.name}: {model.path.name} into {self.factory.reference}"
        program = make_program(module, specs, example_tensors(specs), output_names=self.outputs, note=note)
        program.save(ctx.folder / "program")
        (ctx.folder / "dependencies.json").write_text(json.dumps(reads.digests()), encoding="utf-8")
        return TorchModel(ctx.folder / "program", program.signature)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a safetensors file or a pickle of tensors. No code is run.

    A ``state_dict`` (or ``model``) entry is unwrapped, and a ``module.`` prefix that every name has is dropped.

    Shapes are the file's.

    Raises:
        SourceError: damaged. UnsafeSourceError: the pickle holds more than tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from edgeship.program.checkpoint import open_checkpoint
    from edgeship.program.pickled import TensorRecord

    if path.suffix.lower() == ".safetensors":
        try:
            state: dict[str, torch.Tensor] = load_file(path)
            return state
        except (SafetensorError, OSError, ValueError) as error:
            raise SourceError(f"{path} is not a readable safetensors file: {error}", fix="download it again") from None
    checkpoint = open_checkpoint(path)
    loaded = checkpoint.content
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, TensorRecord) for value in loaded.values()):
        raise SourceError(f"{path} is not a state dict", fix="save model.state_dict()")
    read = {str(name): checkpoint.tensor(value) for name, value in loaded.items()}
    if read and all(name.startswith("module.") for name in read):
        return {name.removeprefix("module."): value for name, value in read.items()}
    return read


def fill(module: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load a state dict strictly. Raises `WeightsError` that names the first weight that does not fit.

    Shapes must be the module's.
    """
    wanted = module.state_dict()
    for name, value in wanted.items():
        if name not in state and name.endswith("num_batches_tracked"):
            # Old checkpoints lack this counter; inference does not read it.
            state = {**state, name: value}
        if name not in state:
            raise WeightsError(f"{path} lacks the weight {name}", fix="give the checkpoint of this model")
        if state[name].shape != value.shape:
            raise WeightsError(
                f"{path}: {name} has shape {tuple(state[name].shape)}, the model wants {tuple(value.shape)}",
                fix="give the checkpoint of this model",
            )
    stray = [name for name in state if name not in wanted]
    if stray:
        raise WeightsError(
            f"{path} holds {stray[0]}, which the model does not have", fix="give the checkpoint of this model"
        )
    module.load_state_dict(state, strict=True)
