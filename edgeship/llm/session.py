"""Engines of language models behind the same interface as all others: a text in, logits out, through the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeship.core.runtimes import Arrays, Session
from edgeship.llm.generation import Stepper, score

if TYPE_CHECKING:
    import numpy.typing as npt


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
        """Logits after each token of the text ``input_ids``."""
        tokens = [int(token) for token in inputs["input_ids"].reshape(-1)]
        return {"logits": score(self.stepper, tokens)[None]}
