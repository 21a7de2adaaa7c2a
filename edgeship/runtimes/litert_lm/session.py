"""A ``.litertlm`` opened: scored through its signatures, timed in LiteRT-LM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeship.core.model import Artifact
from edgeship.errors import ArtifactError
from edgeship.llm.dialogue import Dialogue
from edgeship.llm.session import LanguageSession, TextTimes
from edgeship.runtimes.litert_lm.container import Section, read_sections
from edgeship.runtimes.litert_lm.engine import TextEngine
from edgeship.runtimes.litert_lm.stepper import SignatureStepper

if TYPE_CHECKING:
    from edgeship.runtimes.litert.checked import CheckedFile


class LiteRTLMSession(LanguageSession):
    """Scores through the signatures, writes and is timed through the engine."""

    stepper: SignatureStepper

    def __init__(self, stepper: SignatureStepper) -> None:
        super().__init__(stepper)
        self.engine = TextEngine(stepper.path)
        self._written: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}

    def dialogue(self, folder: Path, eos: Sequence[int]) -> Dialogue:
        """LiteRT-LM's own conversation, its tokenizer, template and stop tokens from the artifact."""
        return self.engine.dialogue()

    def time_text(self, prompt: Sequence[int], new: int, depth: Sequence[int] = ()) -> TextTimes:
        """As LiteRT-LM's own benchmark measures it; it takes as many tokens, but not these ones.

        What the model writes after these is written once more, untimed: the benchmark gives no text.
        """
        whole = self.engine.time(len(depth) + len(prompt), new)
        before = self.engine.time(len(depth), 1).prefill_s if depth else 0.0
        first = max(whole.prefill_s - before, 0.0) + (whole.first_s - whole.prefill_s)
        after = whole.decoded - 1
        return TextTimes(first, after * whole.token_s, len(prompt), after, self._text(tuple(prompt), new))

    def _text(self, prompt: tuple[int, ...], new: int) -> tuple[int, ...]:
        if (prompt, new) not in self._written:
            text = self.engine.text_of(list(prompt))
            # Pieces of words and bytes become more tokens when they are read as a text, and may not fit the context.
            while len(self.engine.tokens_of(text)) > len(prompt):
                text = text[: -max(1, len(text) // 32)]
            written = self.engine.write(text, new)
            # The sign for bytes that are no character would look like a loop when it is made tokens again.
            self._written[prompt, new] = tuple(self.engine.tokens_of(written.replace("\N{REPLACEMENT CHARACTER}", "")))
        return self._written[prompt, new]

    def close(self) -> None:
        """Free the model, the engine, and the files that they keep."""
        self.stepper.free()
        self.engine.close()


def open_session(artifact: Artifact, *, load: bool) -> LiteRTLMSession:
    """Check a file and open it.

    Args:
        load: load the model now, instead of at the first step.

    Raises:
        ArtifactError: damaged, or not what its record says.
    """
    _, graphs, model = open_graphs(artifact.path)
    context, chunk = artifact.spoken().context, artifact.spoken().prefilled()
    if f"prefill_{chunk}" not in graphs:
        raise ArtifactError(f"{artifact.path} has no prefill of {chunk} tokens", fix="build again")
    stepper = SignatureStepper(artifact.path, model, chunk, context)
    if load:
        stepper.load()
    return LiteRTLMSession(stepper)


def open_graphs(path: Path) -> tuple[CheckedFile, dict[str, int], Section]:
    """The checked model inside a ``.litertlm``, the number of each signature's graph, and where it lies."""
    from edgeship.runtimes.litert.checked import open_checked

    model = read_sections(path)["TFLiteModel"]
    file = open_checked(path, model.start, model.size)
    found: dict[str, int] = {}
    for index in range(file.root.SignatureDefsLength()):
        signature = file.root.SignatureDefs(index)
        found[(signature.SignatureKey() or b"").decode(errors="replace")] = int(signature.SubgraphIndex())
    if "decode" not in found:
        raise ArtifactError(f"{path} has no signature decode", fix="build again")
    return file, found, model
