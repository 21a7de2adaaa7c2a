"""lower/decoder_to_coreai: a language model to a Core AI asset with states."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from edgeship.core.decoder import LanguageFacts, context_of
from edgeship.core.model import CoreAIDecoder, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.planning import forms_of, other_runtime
from edgeship.core.profile import Request
from edgeship.errors import UsageError


@dataclass(frozen=True)
class DecoderToCoreAI(Pass):
    """Write a Core AI asset of prefill and decode, which share weights and keep keys and values in states.

    Args:
        context: positions of the caches; the model's own, at most 2048, when None.
        chunk: tokens that prefill takes at once.
        compute: arithmetic of the program and its caches. The Neural Engine computes in float16.
    """

    name: ClassVar[str] = "lower/decoder_to_coreai"
    tools: ClassVar[tuple[str, ...]] = ("torch", "transformers", "coreai-torch", "coreai-core")
    decided: ClassVar[dict[str, str]] = {"context": "--context"}

    context: int | None = None
    chunk: int = 64
    compute: Literal["float16", "float32"] = "float16"

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Itself for Core AI's language models."""
        if reason := other_runtime(request, CoreAIDecoder):
            return Skip(reason)
        compute: Literal["float16", "float32"] = "float32" if request.choice.weights == "float32" else "float16"
        return cls(request.context, compute=compute)

    def confirm(self, request: Request) -> None:
        """Refuse a chunk of no tokens, and a cache that is wider or narrower than what is computed with it."""
        if request.kv_cache not in (None, self.compute):
            raise UsageError(
                f"{self.name} computes in {self.compute}, and its cache is as wide, not {request.kv_cache}",
                fix=f"--kv-cache {self.compute}, or --set {self.name}.compute",
            )
        if self.chunk < 1:
            raise UsageError(f"{self.name}.chunk={self.chunk} takes no tokens", fix="leave it out for 64")

    def run(self, model: TorchModel, ctx: Context) -> CoreAIDecoder:
        """Write ``model.aimodel`` and the tokenizer's files.

        Raises:
            UnsupportedOpError: an operator has no lowering. LoweringError: a weight was lost.
            EncodingError: an encoding has no form. UsageError: a context that the model has not.
        """
        from edgeship.lowering.coreai.decoder import lower_decoder
        from edgeship.lowering.locate import check_floats
        from edgeship.program.program import TorchProgram
        from edgeship.runtimes.coreai.bytecode import blob_places, unsteady_names

        program = TorchProgram.open(model).in_forms(forms_of(CoreAIDecoder))
        decoder, origin = program.language()
        context = context_of(decoder, self.context)
        chunk = min(self.chunk, context)
        check_floats(program.encoded, self.compute, "Core AI")
        path = ctx.folder / "model.aimodel"
        placements = lower_decoder(program, path, context, chunk, self.compute == "float16", blob_places)
        for name in decoder.files:
            shutil.copyfile(origin / name, ctx.folder / name)
        return CoreAIDecoder(
            path,
            program.signature,
            files=(
                *sorted(str(file.relative_to(ctx.folder)) for file in path.rglob("*") if file.is_file()),
                *decoder.files,
            ),
            placements=placements,
            compute="f16" if self.compute == "float16" else "f32",
            facts=unsteady_names(path),
            language=LanguageFacts.of(decoder, context, self.compute, chunk),
        )
