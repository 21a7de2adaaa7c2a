"""load/decoder: a local Hugging Face folder with a language model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from edgeship.core.model import Source, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import Request


@dataclass(frozen=True)
class LoadDecoder(Pass):
    """Read the language model of a local Hugging Face folder: the graph now, its weights when they are needed.

    Args:
        tokens: length of the texts that artifacts are compared on, and that calibration sees; 128 when None, or all
            positions of a model or a ``--context`` that has fewer.
        lora: folder of a PEFT adapter to merge into the weights; ``lora_digest`` is of what it holds.
    """

    name: ClassVar[str] = "load/decoder"
    tools: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    decided: ClassVar[dict[str, str]] = {"lora": "--lora", "lora_digest": "--lora"}

    tokens: int | None = None
    lora: str = ""
    lora_digest: str = ""

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Takes a folder whose ``config.json`` names a language model."""
        if request.source.form != "decoder":
            return Skip(f"{request.source.reference} is not a language model")
        from edgeship.frontends.decoder import DEFAULT_TOKENS

        # Texts are scored through the artifact's cache, and must fit it.
        short = request.context is not None and request.context < DEFAULT_TOKENS
        tokens = max(1, request.context) if short and request.context is not None else None
        lora = str(request.load.get("lora") or "")
        if not lora:
            return cls(tokens)
        from edgeship.frontends.lora import adapter_digest

        return cls(tokens, lora=str(Path(lora).absolute()), lora_digest=adapter_digest(Path(lora)))

    def run(self, model: Source, ctx: Context) -> TorchModel:
        """Export the whole text without a cache: the reference that every engine is compared with."""
        from edgeship.core.artifact import source_digest
        from edgeship.frontends.decoder import load_decoder

        loaded = load_decoder(
            model.path, self.tokens, note=f"{self.name}: {model.path.name}", lora=Path(self.lora) if self.lora else None
        )
        folder = ctx.folder / "program"
        loaded.program.save(folder)
        digests = {str(file.absolute()): source_digest(file) for file in loaded.files}
        (ctx.folder / "dependencies.json").write_text(json.dumps(digests), encoding="utf-8")
        return TorchModel(folder, loaded.program.signature)
