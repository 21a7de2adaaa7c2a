"""Engines of language models behind the same interface as all others: a text in, logits out, through the cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.core.runtimes import Arrays, Session
from edgeship.llm.dialogue import Dialogue, HostedDialogue
from edgeship.llm.generation import Stepper, generate, score

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True)
class TextTimes:
    """One timed text.

    Args:
        prefill_s: from the prompt to the first new token. decode_s: of all new tokens after the first.
        prompt, decoded: how many tokens each was for. tokens: what was written.
    """

    prefill_s: float
    decode_s: float
    prompt: int
    decoded: int
    tokens: tuple[int, ...]


class LanguageSession(Session):
    """A language model opened in its engine.

    `run` answers what the reference program answers, ``input_ids [1, T] -> logits [1, T, vocabulary]``, but through the
    engine's own prefill, decode and cache, so that comparing and evaluating need to know nothing of caches.

    Args:
        stepper: the engine, one step at a time.
    """

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Logits after each token of the text ``input_ids``. ``input_ids`` [1, T] -> ``logits`` [1, T, vocabulary]."""
        tokens = [int(token) for token in inputs["input_ids"].reshape(-1)]
        return {"logits": score(self.stepper, tokens)[None]}

    def dialogue(self, folder: Path, eos: Sequence[int]) -> Dialogue:
        """A conversation through the interface that an app of this engine uses.

        Args:
            folder: with the tokenizer's files and the chat template. eos: tokens that end an answer. Both for engines
                that take tokens only; others have their own.
        """
        return HostedDialogue(self.stepper, folder, eos)

    def time_text(self, prompt: Sequence[int], new: int, depth: Sequence[int] = ()) -> TextTimes:
        """Time a prompt and ``new`` tokens after it, the likeliest ones, behind ``depth`` tokens that are not timed.

        Engines with a loop of their own are timed in that.
        """
        self.stepper.reset()
        if depth:
            self.stepper.read(depth)
        start = time.perf_counter()
        written = generate(self.stepper, prompt, new)
        tokens = [next(written)]
        first = time.perf_counter()
        tokens += list(written)
        return TextTimes(first - start, time.perf_counter() - first, len(prompt), len(tokens) - 1, tuple(tokens))
