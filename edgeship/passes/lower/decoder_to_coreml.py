"""lower/decoder_to_coreml: a language model to a Core ML package with states."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from edgeship.core.decoder import LanguageFacts, context_of
from edgeship.core.model import CoreMLDecoder, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.planning import forms_of, other_runtime
from edgeship.core.profile import Request
from edgeship.errors import LoweringError, UsageError


@dataclass(frozen=True)
class DecoderToCoreML(Pass):
    """Write a Core ML package of prefill and decode, which share weights and keep keys and values in states (iOS 18).

    Args:
        context: positions of the caches; the model's own, at most 2048, when None.
        chunk: tokens that prefill takes at once.
        compute: arithmetic of the program. The Neural Engine computes in float16; caches are float16 either way.
        form: ``ane``, layers rebuilt as 1x1 convolutions for the Neural Engine and checked against the model, or
            ``generic``, layers as they are; ``auto`` takes ane where all parts of the layers are known.
        part_bytes: in the form for the Neural Engine, weights beyond this go into functions of their own.
    """

    name: ClassVar[str] = "lower/decoder_to_coreml"
    tools: ClassVar[tuple[str, ...]] = ("torch", "transformers", "coremltools")
    decided: ClassVar[dict[str, str]] = {"context": "--context"}

    context: int | None = None
    chunk: int = 64
    compute: Literal["float16", "float32"] = "float16"
    form: Literal["auto", "ane", "generic"] = "auto"
    part_bytes: int = 950_000_000

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Itself for Core ML's language models."""
        if reason := other_runtime(request, CoreMLDecoder):
            return Skip(reason)
        compute: Literal["float16", "float32"] = "float32" if request.choice.weights == "float32" else "float16"
        return cls(request.context, compute=compute)

    def confirm(self, request: Request) -> None:
        """Refuse a chunk of no tokens."""
        if self.chunk < 1:
            raise UsageError(f"{self.name}.chunk={self.chunk} takes no tokens", fix="leave it out for 64")
        if self.part_bytes < 1:
            raise UsageError(f"{self.name}.part_bytes={self.part_bytes} holds nothing", fix="leave it out")

    def run(self, model: TorchModel, ctx: Context) -> CoreMLDecoder:
        """Write ``model.mlpackage`` and the tokenizer's files.

        Raises:
            UnsupportedOpError: an operator has no lowering. LoweringError: a weight was lost.
            EncodingError: an encoding has no form. UsageError: a context that the model has not.
        """
        from edgeship.lowering.coreml.decoder import lower_generic
        from edgeship.lowering.coreml.decoder_neural import lower_neural, roles_of
        from edgeship.lowering.locate import check_floats
        from edgeship.program.program import TorchProgram

        program = TorchProgram.open(model).in_forms(forms_of(CoreMLDecoder))
        decoder, origin = program.language()
        context = context_of(decoder, self.context)
        chunk = min(self.chunk, context)
        check_floats(program.encoded, self.compute, "Core ML")
        roles = None if self.form == "generic" else roles_of(program)
        if isinstance(roles, LoweringError):
            if self.form == "ane":
                raise UsageError(roles.what, fix=roles.fix)
            roles = None
        half = self.compute == "float16"
        form, system = "generic" if roles is None else "ane", "iOS18"
        language = LanguageFacts.of(decoder, context, "float16", chunk)
        texts = {**language.texts(), "form": form, "minimum_deployment_target": system}
        path = ctx.folder / "model.mlpackage"
        if roles is not None:
            placements = lower_neural(program, roles, path, context, chunk, half, self.part_bytes, texts)
        else:
            placements = lower_generic(program, path, context, chunk, half, texts)
        for name in decoder.files:
            shutil.copyfile(origin / name, ctx.folder / name)
        return CoreMLDecoder(
            path,
            program.signature,
            files=(path.name, *decoder.files),
            placements=placements,
            compute="f16" if half else "f32",
            facts={key: text for key, text in texts.items() if key not in language.texts()},
            language=language,
        )
