"""lower/decoder_to_litert_lm: a language model to the ``.litertlm`` that LiteRT-LM opens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from edgeship.core.decoder import LanguageFacts, context_of
from edgeship.core.forms import ActivationMode
from edgeship.core.model import LiteRTLMModel, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.planning import forms_of, other_runtime
from edgeship.core.profile import Request
from edgeship.errors import LoweringError


@dataclass(frozen=True)
class DecoderToLiteRTLM(Pass):
    """Write a .litertlm for LiteRT-LM: prefill and decode over shared weights, tokenizer and metadata.

    Args:
        context: positions of the cache; the model's own, at most 2048, when None.
        chunk: tokens that prefill takes at once; 64, or the context where that is shorter, when None. A second prefill
            of an eighth of it takes what is left of a prompt.
        activations: ``float`` computes in float32, with integer weights dequantized first; ``dynamic`` lets kernels
            quantize activations to int8 while running.
    """

    name: ClassVar[str] = "lower/decoder_to_litert_lm"
    tools: ClassVar[tuple[str, ...]] = (
        "torch", "transformers", "litert-torch", "litert-converter", "ai-edge-litert", "litert-lm-builder",
    )  # fmt: skip
    decided: ClassVar[dict[str, str]] = {"context": "--context"}

    context: int | None = None
    chunk: int | None = None
    activations: ActivationMode = "float"

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Itself for LiteRT-LM."""
        if reason := other_runtime(request, LiteRTLMModel):
            return Skip(reason)
        return cls(request.context, activations=request.choice.activations)

    def run(self, model: TorchModel, ctx: Context) -> LiteRTLMModel:
        """Write ``model.litertlm``.

        Raises `UnsupportedOpError`, `LoweringError`, `EncodingError` or `UsageError`.
        """
        from edgeship.lowering.litert.decoder import chunks_of, write_decoder
        from edgeship.program.program import TorchProgram

        program = TorchProgram.open(model).in_forms(forms_of(LiteRTLMModel))
        decoder, _ = program.language()
        context = context_of(decoder, self.context)
        # The engine fills a chunk's end with other tokens, which no mask hides from a state.
        chunks = chunks_of(context, 1 if decoder.states else self.chunk)
        path = ctx.folder / "model.litertlm"
        placements, made_of = write_decoder(
            program, path, context=context, chunks=chunks, activations=self.activations, progress=ctx.progress,
        )  # fmt: skip
        return LiteRTLMModel(
            path,
            program.signature,
            files=(path.name,),
            placements=placements,
            compute="int" if self.activations == "dynamic" else "f32",
            facts={"activations": self.activations, **made_of},
            language=LanguageFacts.of(decoder, context, "float32", chunks[0]),
        )

    def ensures(self, output: Any, **inputs: Any) -> None:
        """Every weight that compression decided has a place in the file."""
        from edgeship.program.program import read_record

        placed = {placement.weight for placement in output.placements}
        missing = [name for name in read_record(inputs["model"]).encodings if name not in placed]
        if missing:
            raise LoweringError(f"weight {missing[0]} is not in {output.path.name}", fix="report this as a bug")
