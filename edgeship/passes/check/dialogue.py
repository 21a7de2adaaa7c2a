"""check/dialogue: talk to a language model as an app does, and compare every token with the torch program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgeship.core.forms import ActivationMode
from edgeship.core.model import Artifact, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.profile import Request
from edgeship.core.report import Measurement, Verdict
from edgeship.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeship.llm.dialogue import Answer, Dialogue, Speaker
    from edgeship.program.compare import Reference

MESSAGES = ("What is the capital of France?", "And of Italy?", "Thank you.")
# How far behind the reference's first choice a token may be, in standard deviations of its logits, by the arithmetic.
# The first choice is 4 and more above the mean; what a wrong prompt or a broken cache makes a model write is 1 and more
# below it.
WITHIN: dict[str, float] = {"f32": 0.02, "f16": 0.1, "int16": 0.15}
ROUNDED = 0.5
# Emulators take seconds for a token.
NATIVE = (3, 12)
EMULATED = (1, 4)


@dataclass(frozen=True)
class CheckDialogue(Pass):
    """Talk to a language model through the interface that an app uses, and compare with the torch program.

    The template, the tokenizer, the search options, the tokens that end an answer and the cache across turns are the
    artifact's and the engine's own. The prompt must be transformers' text, and every token of an answer the reference's
    first choice, or as close to it as the arithmetic is exact.

    Args:
        turns: messages of the conversation. tokens: most tokens of an answer. activations: how operators compute.
    """

    name: ClassVar[str] = "check/dialogue"
    tools: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    runtime: str = ""
    turns: int = NATIVE[0]
    tokens: int = NATIVE[1]
    activations: ActivationMode = "float"

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Planned for engines of language models."""
        from edgeship.core.registry import runtimes

        engine = runtimes()[request.runtime].engine
        if not engine.for_language:
            return Skip("only language models talk")
        turns, tokens = EMULATED if engine.execution == "emulated" else NATIVE
        return cls(request.runtime, turns, tokens, request.choice.activations)

    def confirm(self, request: Request) -> None:
        """Refuse a conversation of nothing."""
        if not 1 <= self.turns <= len(MESSAGES) or self.tokens < 1:
            raise UsageError(
                f"{self.name} talks for 1 to {len(MESSAGES)} turns of 1 or more tokens", fix="leave both out"
            )

    def run(self, model: Artifact, reference: TorchModel, ctx: Context) -> Verdict:
        """Talk, then ask the reference about every token."""
        from edgeship.core.registry import runtimes
        from edgeship.llm.dialogue import Speaker
        from edgeship.llm.session import LanguageSession
        from edgeship.program.compare import Reference
        from edgeship.program.program import TorchProgram

        program = TorchProgram.open(reference)
        decoder, origin = program.language()
        arithmetic = self.activations if self.activations != "float" else model.compute
        within = ROUNDED if model.spoken().cache == "int8" else WITHIN.get(arithmetic, ROUNDED)
        speaker = Speaker(origin)
        length = program.signature.inputs[0].shape[1]
        room = min(model.spoken().context, length)
        heard = Heard(speaker, tuple(decoder.eos), within)
        runtime = runtimes()[self.runtime]
        with runtime.open(model) as session:
            assert isinstance(session, LanguageSession)
            talk = session.dialogue(origin, decoder.eos)
            try:
                self._talk(talk, heard, room, ctx)
            except ArtifactError as error:
                heard.problems.append(f"{talk.interface} stopped: {error}")
            finally:
                talk.close()
        if not heard.problems:
            heard.judge(Reference(program), length)
        return self._verdict(heard, talk.interface)

    def _talk(self, talk: Dialogue, heard: Heard, room: int, ctx: Context) -> None:
        for number, message in enumerate(MESSAGES[: self.turns]):
            ctx.progress(number, self.turns + 1, "talking")
            if len(heard.prompt(message)) + self.tokens > room:
                return
            answer = talk.say(message, self.tokens)
            if not heard.add(message, answer, whole=talk.whole):
                return

    def _verdict(self, heard: Heard, interface: str) -> Verdict:
        ended = sum(answer.ended for answer in heard.answers)
        figures = (
            Measurement("answers", len(heard.answers), "answers", "measured", runtime=self.runtime),
            Measurement("tokens_compared", heard.compared, "tokens", "measured", runtime=self.runtime),
            Measurement("furthest_token", heard.furthest, "standard deviations", "measured", runtime=self.runtime),
        )
        if heard.problems:
            return Verdict(
                self.name, self.runtime, False, heard.problems[0], figures,
                fix="report this with the model's name; the artifact would answer apps wrongly",
            )  # fmt: skip
        if not heard.answers:
            summary = f"no message fits the context, so nothing was said through {interface}"
        else:
            summary = (
                f"{len(heard.answers)} answers through {interface}, {heard.compared} tokens as the reference chooses "
                f"them, {ended} ended by the model"
            )
        if heard.unread:
            summary += f"; {heard.unread} answers are spelled in another way than they were written, and not compared"
        return Verdict(self.name, self.runtime, True, summary, figures)


@dataclass
class Heard:
    """A conversation so far.

    Args:
        within: how far a token may be behind the first choice.
        texts: answers, tokens of their prompts and of themselves.
        problems: what is wrong, in words. unread: answers whose text does not give their tokens back.
    """

    speaker: Speaker
    eos: tuple[int, ...]
    within: float
    turns: list[dict[str, str]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    texts: list[tuple[Answer, list[int], list[int]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unread: int = 0
    compared: int = 0
    furthest: float = 0.0

    def prompt(self, message: str) -> list[int]:
        """Tokens of the conversation with a message behind it."""
        return self.speaker.tokens(self.speaker.text([*self.turns, {"role": "user", "content": message}]))

    def add(self, message: str, answer: Answer, *, whole: bool) -> bool:
        """Take an answer; whether the conversation can go on as transformers would have it."""
        prompt = self.prompt(message)
        self.turns.append({"role": "user", "content": message})
        wanted, number = self.speaker.text(self.turns), len(self.answers) + 1
        same = wanted == answer.heard if whole or number == 1 else wanted.endswith(answer.heard)
        if not same and wanted.removeprefix(self._start()) != answer.heard:
            self.problems.append(f"for answer {number} the engine hands over {_differing(answer.heard, wanted)}")
            return False
        self.turns.append({"role": "assistant", "content": answer.text})
        self.answers.append(answer)
        written = self.speaker.spelled(answer.text) if answer.written is None else list(answer.written)
        known = len(written) == answer.tokens
        if known:
            self.texts.append((answer, prompt, written))
        else:
            self.unread += 1
        # Of an answer that was cut, engines keep no end in their cache, where the template writes one.
        return known and (answer.ended or self.speaker.template is None)

    def _start(self) -> str:
        """What a text may begin with that the engine puts there itself."""
        return self.speaker.template.variables.get("bos_token", "") if self.speaker.template else ""

    def judge(self, reference: Reference, length: int) -> None:
        """Ask the reference about every token. It takes texts of ``length``; what is behind a token does not matter."""
        import numpy as np

        for number, (answer, prompt, written) in enumerate(self.texts, 1):
            tokens = [*prompt, *written][:length]
            padded = np.array([tokens + [0] * (length - len(tokens))], np.int64)
            inputs = {"input_ids": padded}
            logits = reference.run(inputs)["logits"][0]
            close = reference.undecided(inputs, self.within).reshape(-1)
            before = len(self.problems)
            for place in range(len(prompt) - 1, min(len(tokens), len(prompt) + len(written))):
                taken = tokens[place + 1 : place + 2] or (list(self.eos) if answer.ended else [])
                if taken and not (close.size and close[place]):
                    self._compare(logits[place], taken, number, place + 2 - len(prompt))
            # A text may split into other tokens than were written; then the reference writes it by its own.
            if (
                len(self.problems) > before
                and answer.written is None
                and self._rewritten(reference, length, prompt, answer)
            ):
                del self.problems[before:]

    def _rewritten(self, reference: Reference, length: int, prompt: list[int], answer: Answer) -> bool:
        """Whether the reference, token by token, writes an answer's text."""
        import numpy as np

        tokens = list(prompt)
        while len(tokens) < min(length, len(prompt) + answer.tokens + answer.ended):
            padded = np.array([tokens + [0] * (length - len(tokens))], np.int64)
            tokens.append(int(reference.run({"input_ids": padded})["logits"][0][len(tokens) - 1].argmax()))
        ended = tokens[-1] in self.eos
        written = tokens[len(prompt) : len(tokens) - ended]
        return ended == answer.ended and self.speaker.tokenizer.decode(written) == answer.text

    def _compare(self, row: npt.NDArray[Any], taken: Sequence[int], number: int, place: int) -> None:
        """Count how far the engine's token is behind the likeliest; ``row``: the reference's logits, [vocabulary]."""
        self.compared += 1
        best = max(taken, key=lambda token: row[token])
        behind = float((row.max() - row[best]) / (row.std() or 1.0))
        self.furthest = max(self.furthest, behind)
        if behind > self.within and not self.problems:
            decode = self.speaker.tokenizer.decode
            found, wanted = (decode([int(token)], skip_special_tokens=False) for token in (best, row.argmax()))
            self.problems.append(
                f"token {place} of answer {number} is {found!r} where the reference has {wanted!r}, {behind:.2f} "
                f"standard deviations better; {self.within:g} would be rounding"
            )


def _differing(found: str, wanted: str) -> str:
    """Where two texts part, in words."""
    place = next((i for i, (one, two) in enumerate(zip(found, wanted, strict=False)) if one != two), None)
    place = min(len(found), len(wanted)) if place is None else place
    part = slice(max(0, place - 20), place + 40)
    return f"{found[part]!r} where transformers writes {wanted[part]!r}"
