"""A conversation through the interface that an app uses, whatever the engine: what it hears, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeship.llm.chat import ChatTemplate
from edgeship.llm.generation import Stepper, generate

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Answer:
    """One answer.

    Args:
        heard: the text that the engine handed to the model for it. text: what it answered.
        tokens: how many it wrote, without the one that ended it. ended: whether the model ended it.
        written: those tokens, of engines that tell them.
    """

    heard: str
    text: str
    tokens: int
    ended: bool
    written: tuple[int, ...] | None = None


class Dialogue(ABC):
    """A conversation, or without a chat template one text after another.

    Attributes:
        interface: what an app calls it. whole: whether the model is handed the whole conversation for each answer, not
            what is new of it.
    """

    interface: str
    whole: bool = True

    @abstractmethod
    def say(self, text: str, limit: int) -> Answer:
        """The likeliest answer of at most ``limit`` tokens. Raises `ArtifactError` when the engine refuses."""

    def close(self) -> None:  # noqa: B027  most hold nothing
        """Free what it holds."""


class Speaker:
    """A model's tokenizer and template, as transformers uses them.

    Args:
        folder: with the tokenizer's files.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.template = ChatTemplate.read(folder)

    def text(self, turns: Sequence[dict[str, str]]) -> str:
        """What the model is handed of a conversation; the last message where there is no template."""
        return turns[-1]["content"] if self.template is None else self.template.render(turns)

    def tokens(self, text: str) -> list[int]:
        """A text that `text` made, as tokens."""
        found = self.tokenizer.encode(text, add_special_tokens=self.template is None)
        return [int(token) for token in found.ids]

    def spelled(self, text: str) -> list[int]:
        """A part of a text as tokens."""
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False).ids]


class HostedDialogue(Dialogue):
    """For engines that take tokens only: an app has the tokenizer and the template, as `edgeship.conversation` has."""

    interface = "tokens and the model's template"

    def __init__(self, stepper: Stepper, folder: Path, eos: Sequence[int]) -> None:
        self._stepper, self._speaker, self._eos = stepper, Speaker(folder), tuple(eos)
        self._turns: list[dict[str, str]] = []

    def say(self, text: str, limit: int) -> Answer:
        """Through the engine's own steps and cache."""
        self._turns.append({"role": "user", "content": text})
        heard = self._speaker.text(self._turns)
        self._stepper.reset()
        found = list(generate(self._stepper, self._speaker.tokens(heard), limit, self._eos))
        ended = bool(found) and found[-1] in self._eos
        written = found[:-1] if ended else found
        said = self._speaker.tokenizer.decode(written, skip_special_tokens=True)
        self._turns.append({"role": "assistant", "content": said})
        return Answer(heard, said, len(written), ended, tuple(written))
