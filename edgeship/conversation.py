"""Talk to a built language model: its own engine, its own tokenizer and chat template, all from the bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.core.artifact import TOKENIZER
from edgeship.core.registry import runtimes
from edgeship.core.units import human_bytes
from edgeship.errors import SourceError, UsageError
from edgeship.llm.generation import likeliest

if TYPE_CHECKING:
    from edgeship.core.model import Artifact
    from edgeship.llm.encoder_decoder import EncoderDecoder
    from edgeship.llm.session import LanguageSession


class Conversation:
    """Turns of text with one model, which keeps what was said in its cache as long as that fits.

    Args:
        tokenizer: transformers' tokenizer of the model. eos: tokens that end an answer.
        plain: continue the text instead of answering in the chat template.

    Attributes:
        pick: chooses the next token from logits; greedy unless set. written: tokens of the last answer.
        remark: what is to be said of it.
    """

    def __init__(self, session: LanguageSession, tokenizer: Any, eos: tuple[int, ...], title: str, plain: bool) -> None:
        self.session, self.tokenizer, self.eos, self.title = session, tokenizer, eos, title
        self.templated = bool(getattr(tokenizer, "chat_template", None)) and not plain
        self.turns: list[dict[str, str]] = []
        self.pick: Callable[[Any], int] = likeliest
        self.written = 0
        self.remark = ""

    def reset(self) -> None:
        """Forget what was said."""
        self.turns.clear()

    def say(self, text: str, limit: int) -> Iterator[str]:
        """The answer to a text, piece by piece as it is written.

        Raises `UsageError` when everything said so far no longer fits the context.
        """
        from edgeship.llm.generation import find_loop, generate

        self.turns.append({"role": "user", "content": text})
        stepper = self.session.stepper
        prompt = self._prompt(text)
        if len(prompt) >= stepper.context:
            self.turns.pop()
            raise UsageError(
                f"{len(prompt)} tokens do not fit the context of {stepper.context}", fix="begin anew with /new"
            )
        stepper.reset()
        tokens: list[int] = []
        shown = ""
        for token in generate(stepper, prompt, limit, self.eos, self.pick):
            if token in self.eos:
                break
            tokens.append(token)
            whole = self.tokenizer.decode(tokens, skip_special_tokens=True)
            # A character may come in several tokens; its first bytes alone decode to a replacement sign.
            if not whole.endswith("\N{REPLACEMENT CHARACTER}"):
                yield whole[len(shown) :]
                shown = whole
        self.written = len(tokens)
        loop = find_loop(tokens)
        self.remark = f"; it is stuck in a loop of {len(loop.cycle)} tokens" if loop else ""
        self.turns.append({"role": "assistant", "content": shown})

    def _prompt(self, text: str) -> list[int]:
        if self.templated:
            found = self.tokenizer.apply_chat_template(self.turns, add_generation_prompt=True, tokenize=True)
            return [int(token) for token in getattr(found, "input_ids", found)]
        said = "".join(turn["content"] for turn in self.turns)
        return [int(token) for token in self.tokenizer(said).input_ids] or self._nothing(text)

    def _nothing(self, text: str) -> list[int]:
        self.turns.pop()
        raise UsageError(f"{text!r} holds no tokens", fix="say something")


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
    from edgeship.llm.session import LanguageSession
    from edgeship.shipping.bundle import check_whole, opened, read_bundle

    bundle = read_bundle(bundle_path)
    engines = [record for record in bundle.manifest.artifacts if runtimes()[record.runtime].language_of]
    if not engines:
        raise UsageError(
            f"{bundle_path} holds no language model to talk to",
            fix="build one from a Hugging Face folder; with the two parts of an encoder-decoder Python writes",
        )
    named = [item for item in engines if runtime in (item.runtime, runtimes()[item.runtime].language_of)]
    if runtime is not None and not named:
        raise UsageError(
            f"{bundle_path} has nothing for {runtime}", fix=f"it has {', '.join(e.runtime for e in engines)}"
        )
    timed = [item for item in engines if runtimes()[item.runtime].timed]
    record = (named or timed or engines)[0]
    check_whole(bundle)
    engine = runtimes()[record.runtime]
    engine.versions()
    tokenizer = _tokenizer(bundle_path / TOKENIZER)
    artifact = opened(bundle, record)
    size = human_bytes(sum(file.bytes for file in record.files))
    eos = tuple(int(token) for token in record.facts.get("eos", "").split(",") if token)
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
    record = next((item for item in found if runtimes()[item.runtime].timed), found[0])
    runtimes()[record.runtime].versions()
    return opened(bundle, record)


def _tokenizer(folder: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # JSON, tokenizers' and config errors of many types
        raise SourceError(
            f"{folder} holds no tokenizer: {' '.join(str(error).split())[:200]}", fix="build the bundle again"
        ) from error
