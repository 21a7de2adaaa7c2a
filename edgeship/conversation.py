"""Talk to a built language model: its own engine, its own tokenizer and chat template, all from the bundle."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.core.artifact import TOKENIZER, ArtifactRecord
from edgeship.core.registry import runtimes
from edgeship.core.units import human_bytes
from edgeship.errors import SourceError, UsageError
from edgeship.llm.generation import find_loop, generate, likeliest, never

if TYPE_CHECKING:
    from edgeship.core.model import Artifact
    from edgeship.llm.encoder_decoder import EncoderDecoder
    from edgeship.llm.session import LanguageSession

# An answer gets this part of the context before what was said is forgotten for it: a quarter.
ROOM = 4


class Conversation:
    """Turns of text with one model, which keeps what was said in its cache as long as that fits.

    Args:
        tokenizer: transformers' tokenizer of the model. eos: tokens that end an answer.
        plain: continue the text instead of answering in the chat template.

    Attributes:
        pick: chooses the next token from logits; greedy unless set. stopped: asked between tokens; an answer ends when
            it says so. turns: what was said and is still known. written: tokens of the last answer.
        remarks: what is to be said of it.
    """

    def __init__(self, session: LanguageSession, tokenizer: Any, eos: tuple[int, ...], title: str, plain: bool) -> None:
        self.session, self.tokenizer, self.eos, self.title = session, tokenizer, eos, title
        self.templated = bool(getattr(tokenizer, "chat_template", None)) and not plain
        self.turns: list[dict[str, str]] = []
        self.pick: Callable[[Any], int] = likeliest
        self.stopped: Callable[[], bool] = never
        self.written = 0
        self.remarks: list[str] = []
        # The tokens that the engine's cache holds.
        self._cached: list[int] = []

    def reset(self) -> None:
        """Forget what was said."""
        self.turns = []

    def say(self, text: str, limit: int) -> Generator[str, None, None]:
        """The answer to a text, piece by piece as it is written, in whole characters.

        An answer that is broken off, by `stopped` or by closing the iterator, stays as far as it was written; without a
        first word the message is taken back. When the engine fails, nothing of the turn stays.

        Where the context would not hold the conversation and an answer to it, the oldest turns are forgotten.

        Raises `UsageError` when the message alone does not fit the context, or the chat template refuses it.
        """
        self.written, self.remarks = 0, []
        kept, prompt = self._fitted([*self.turns, {"role": "user", "content": text}], limit)
        self._note_forgotten(len(self.turns) + 1 - len(kept))
        tokens: list[int] = []
        shown = ""
        try:
            for token in self._continued(prompt, limit):
                tokens.append(token)
                if token in self.eos:
                    break
                self.written = len(tokens)
                whole = self._text(tokens)
                # A character may come in several tokens; its first bytes alone decode to a replacement sign.
                if not whole.endswith("\N{REPLACEMENT CHARACTER}"):
                    piece, shown = whole[len(shown) :], whole
                    yield piece
        except GeneratorExit:
            self._keep(kept, shown, tokens, broken=True)
            raise
        except BaseException:
            self._cached = []
            raise
        ended = bool(tokens) and tokens[-1] in self.eos
        self._keep(kept, shown, tokens, broken=not ended and self.stopped())
        self._note_end(tokens, ended, limit)

    def _keep(self, kept: list[dict[str, str]], shown: str, tokens: list[int], *, broken: bool) -> None:
        """Add a turn to what is known, unless it was broken off before its first word."""
        if broken and not shown:
            self.remarks.append("stopped before a word was written; the message is taken back")
            return
        self.turns = [*kept, {"role": "assistant", "content": shown}]
        if broken:
            self.remarks.append("stopped; the conversation goes on from what was written")

    def _note_forgotten(self, count: int) -> None:
        if count:
            held = f"the context of {self.session.stepper.context} tokens"
            self.remarks.append(f"{held} is full: the oldest {count} messages are forgotten")

    def _note_end(self, tokens: list[int], ended: bool, limit: int) -> None:
        """Say why an answer ended, where the model did not end it."""
        loop = find_loop(tokens)
        if loop:
            self.remarks.append(f"it is stuck in a loop of {len(loop.cycle)} tokens")
        stepper = self.session.stepper
        if ended or self.stopped():
            return
        if len(tokens) >= limit:
            self.remarks.append(f"cut off after {limit} tokens")
        elif stepper.position >= stepper.context:
            self.remarks.append(f"cut off: the context of {stepper.context} tokens is full")

    def _continued(self, prompt: list[int], limit: int) -> Iterator[int]:
        """The next tokens; what the cache holds of the prompt is not read again."""
        stepper, known = self.session.stepper, len(self._cached)
        if not 0 < known < len(prompt) or prompt[:known] != self._cached:
            stepper.reset()
            known = 0
        self._cached = []
        fed = list(prompt)
        for token in generate(stepper, prompt[known:], limit, self.eos, self.pick, self.stopped):
            fed.append(token)
            self._cached = fed[: stepper.position]
            yield token

    def _fitted(self, turns: list[dict[str, str]], limit: int) -> tuple[list[dict[str, str]], list[int]]:
        """The newest turns that leave room for an answer, a message and its answer at a time, and their tokens."""
        context = self.session.stepper.context
        room = min(limit, context // ROOM)
        while True:
            prompt = self._prompt(turns)
            if not prompt:
                raise UsageError(f"{turns[-1]['content']!r} holds no tokens", fix="say something")
            if len(prompt) + room <= context or (len(turns) == 1 and len(prompt) < context):
                return turns, prompt
            if len(turns) == 1:
                raise UsageError(
                    f"this message is {len(prompt)} tokens, and the context holds {context}",
                    fix="say less at once, or build with a longer --context",
                )
            turns = turns[2:]

    def _prompt(self, turns: list[dict[str, str]]) -> list[int]:
        if not self.templated:
            said = "".join(turn["content"] for turn in turns)
            return [int(token) for token in self.tokenizer(said).input_ids]
        try:
            found = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)
        except Exception as error:  # whatever a template's own expressions raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UsageError(
                f"the model's chat template refuses this conversation: {reason}", fix="begin anew with /new, or --plain"
            ) from error
        return [int(token) for token in getattr(found, "input_ids", found)]

    def _text(self, tokens: list[int]) -> str:
        # Without the blanks that some tokenizers take away before a comma: what is on the screen cannot be taken back.
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@contextmanager
def open_conversation(
    bundle_path: Path, runtime: str | None = None, *, plain: bool = False, adapter: str = ""
) -> Iterator[Conversation]:
    """Open a bundle's language model in its engine.

    Args:
        runtime: name of the engine, or of the runtime whose format it has; by default the first that is quick here.
        adapter: name of an adapter that the artifact has beside its base; the base alone when empty.

    Raises:
        UsageError: no language model in the bundle, or none for that runtime. ArtifactError: a file was changed.
    """
    from edgeship.shipping.bundle import read_bundle

    bundle = read_bundle(bundle_path)
    engines = [record for record in bundle.manifest.artifacts if runtimes()[record.runtime].engine.for_language]
    if not engines:
        raise UsageError(
            f"{bundle_path} holds no language model to talk to",
            fix="build one from a Hugging Face folder; with the two parts of an encoder-decoder Python writes",
        )
    named = [item for item in engines if runtime in (item.runtime, runtimes()[item.runtime].format.name)]
    if runtime is not None and not named:
        raise UsageError(
            f"{bundle_path} has nothing for {runtime}", fix=f"it has {', '.join(e.runtime for e in engines)}"
        )
    timed = [item for item in engines if not runtimes()[item.runtime].engine.untimed]
    with open_talk(bundle_path, (named or timed or engines)[0], plain=plain, adapter=adapter) as talk:
        yield talk


@contextmanager
def open_talk(
    bundle_path: Path, record: ArtifactRecord, *, plain: bool = False, adapter: str = ""
) -> Iterator[Conversation]:
    """Open one artifact of a bundle, a language model's, in its engine. Arguments and errors as in
    `open_conversation`."""
    from edgeship.llm.session import LanguageSession
    from edgeship.shipping.bundle import check_whole, opened, read_bundle

    bundle = read_bundle(bundle_path)
    check_whole(bundle)
    engine = runtimes()[record.runtime]
    engine.versions()
    tokenizer = _tokenizer(bundle_path / TOKENIZER)
    artifact = opened(bundle, record)
    size = human_bytes(sum(file.bytes for file in record.files))
    eos = artifact.spoken().eos
    with engine.open_fast(artifact) as session:
        assert isinstance(session, LanguageSession)
        session.adapt(adapter)
        yield Conversation(session, tokenizer, eos, f"{record.main}, {size}, {engine.title}", plain)


@contextmanager
def open_encoder_decoder(encoder: Path, decoder: Path, runtime: str | None = None) -> Iterator[EncoderDecoder]:
    """Open the two bundles of an encoder-decoder (``build --part encoder`` and ``--part decoder``) in one runtime.

    Args:
        runtime: its name; by default the first of the decoder's that is quick here.

    Raises:
        UsageError: a bundle without that runtime, or two of other shapes. Two models of one shape are not told apart.
        ArtifactError: a file was changed.
    """
    from edgeship.llm.encoder_decoder import EncoderDecoder

    write = _artifact(decoder, runtime)
    read = _artifact(encoder, write.runtime)
    answers = {spec.name: spec.shape for spec in read.signature.outputs}
    for spec in write.signature.inputs:
        if spec.name.startswith("cross_") and answers.get(spec.name) != spec.shape:
            raise UsageError(
                f"{decoder} wants {spec}, which {encoder} does not answer", fix="build both parts from one model"
            )
    if not any(spec.name.startswith("cross_") for spec in write.signature.inputs):
        raise UsageError(f"{decoder} is no decoder of an encoder-decoder", fix="build it with --part decoder")
    engine = runtimes()[write.runtime]
    with engine.open_fast(read) as reading, engine.open_fast(write) as writing:
        yield EncoderDecoder(reading, writing, write.signature.inputs)


def _artifact(bundle_path: Path, runtime: str | None) -> Artifact:
    from edgeship.shipping.bundle import check_whole, opened, read_bundle

    bundle = read_bundle(bundle_path)
    check_whole(bundle)
    there = bundle.manifest.artifacts
    found = [item for item in there if runtime in (None, item.runtime)]
    if not found:
        names = ", ".join(item.runtime for item in there)
        raise UsageError(f"{bundle_path} has nothing for {runtime}", fix=f"it has {names}")
    record = next((item for item in found if not runtimes()[item.runtime].engine.untimed), found[0])
    runtimes()[record.runtime].versions()
    return opened(bundle, record)


def _tokenizer(folder: Path) -> Any:
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # JSON, tokenizers' and config errors of many types
        raise SourceError(
            f"{folder} holds no tokenizer: {' '.join(str(error).split())[:200]}", fix="build the bundle again"
        ) from error
    finally:
        transformers.logging.set_verbosity(before)
