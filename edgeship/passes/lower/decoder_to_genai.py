"""lower/decoder_to_genai: a language model to the folder that onnxruntime-genai opens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from edgeship.core.decoder import context_of, language_facts
from edgeship.core.model import GenaiModel, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import Request
from edgeship.core.runtimes import ActivationMode
from edgeship.errors import LoweringError


@dataclass(frozen=True)
class DecoderToGenai(Pass):
    """Write a folder for onnxruntime-genai: the decoder with GroupQueryAttention, its configuration and tokenizer.

    Args:
        context: positions of the cache; the model's own, at most 2048, when None.
        activations: ``dynamic`` lets the kernels of 4-bit products round activations to int8, which is faster.
    """

    name: ClassVar[str] = "lower/decoder_to_genai"
    tools: ClassVar[tuple[str, ...]] = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")
    decided: ClassVar[dict[str, str]] = {"context": "--context"}

    context: int | None = None
    activations: ActivationMode = "float"

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Itself for onnxruntime-genai."""
        if request.runtime != GenaiModel.runtime:
            return Skip(f"only for runtime {GenaiModel.runtime}")
        return cls(request.context, request.choice.activations)

    def run(self, model: TorchModel, ctx: Context) -> GenaiModel:
        """Write ``genai/``. Raises `UnsupportedOpError`, `LoweringError`, `EncodingError` or `UsageError`."""
        from edgeship.lowering.onnx.decoder import export_decoder
        from edgeship.lowering.onnx.genai import GRAPH, write_configuration
        from edgeship.lowering.onnx.save import save_model
        from edgeship.lowering.onnx.weights import place_weights
        from edgeship.program.program import TorchProgram

        program = TorchProgram.open(model)
        decoder = program.record.decoder
        if decoder is None or program.origin is None:
            raise LoweringError("this program is no language model", fix="give a folder with one")
        context = context_of(decoder, self.context)
        ctx.progress(0, 3, "export")
        graph, weights = export_decoder(program)
        ctx.progress(1, 3, "place weights")
        placements = place_weights(graph, weights, program, self.activations)
        folder = ctx.folder / "genai"
        folder.mkdir()
        ctx.progress(2, 3, "write")
        save_model(graph, folder / GRAPH, apart=True, standard=False)
        write_configuration(folder, decoder, program.origin, context)
        return GenaiModel(
            folder,
            program.signature,
            files=("genai",),
            placements=placements,
            compute="int" if self.activations == "dynamic" else "f32",
            facts=language_facts(decoder, context),
        )

    def ensures(self, output: Any, **inputs: Any) -> None:
        """Every weight that compression decided has a place in the file."""
        from edgeship.program.program import read_record

        placed = {placement.weight for placement in output.placements}
        missing = [name for name in read_record(inputs["model"]).encodings if name not in placed]
        if missing:
            raise LoweringError(f"weight {missing[0]} is not in {output.path.name}", fix="report this as a bug")
