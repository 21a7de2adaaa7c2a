"""load/llama2c: a checkpoint of llama2.c with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from edgeship.core.model import Source, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import Request


@dataclass(frozen=True)
class LoadLlama2c(Pass):
    """Read the language model of a llama2.c checkpoint, and the tokenizer beside it.

    Args:
        tokens: as in load/decoder.
    """

    name: ClassVar[str] = "load/llama2c"
    tools: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")

    tokens: int | None = None

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Takes a ``.bin`` as long as a checkpoint's header says."""
        if request.source.form != "llama2c":
            return Skip(f"{request.source.reference} is not a llama2.c checkpoint")
        return cls()

    def run(self, model: Source, ctx: Context) -> TorchModel:
        """Write it as a Hugging Face folder, and load that as load/decoder does."""
        import shutil

        from edgeship.frontends.decoder import load_decoder
        from edgeship.frontends.llama2c import write_folder

        written = ctx.folder / "written"
        write_folder(model.path, written)
        loaded = load_decoder(written, self.tokens, note=f"{self.name}: {model.path.name}", keep=True)
        loaded.program.save(ctx.folder / "program")
        shutil.rmtree(written)
        return TorchModel(ctx.folder / "program", loaded.program.signature)
