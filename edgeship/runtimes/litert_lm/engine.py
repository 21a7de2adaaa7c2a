"""LiteRT-LM itself: text in, text out, and its own clock."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeship.errors import ArtifactError
from edgeship.llm.dialogue import Answer, Dialogue
from edgeship.runtimes.litert_lm.container import read_content, read_sections

THREADS = 2
# The weights as kernels want them are otherwise written beside the artifact, and are as large as it is.
NO_CACHE = ":nocache"


@dataclass(frozen=True)
class EngineTimes:
    """What LiteRT-LM measured of one text: seconds of taking it, of its first token, and of one token after it."""

    prefill_s: float
    first_s: float
    token_s: float
    decoded: int


class TextEngine:
    """LiteRT-LM on two threads of the CPU. Nothing is loaded before it is asked for.

    Args:
        path: the ``.litertlm``, checked before: the engine trusts it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._engine: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def write(self, prompt: str, new: int) -> str:
        """The likeliest continuation of a text, at most ``new`` tokens.

        Raises `ArtifactError` when the engine refuses the model or the prompt.
        """
        engine = self._opened()
        session = engine.create_session(apply_prompt_template=False, max_output_tokens=new)
        try:
            session.run_prefill([prompt])
            return str(session.run_decode().texts[0])
        except (RuntimeError, IndexError) as error:
            raise self.stopped(error) from None
        finally:
            session.close()

    def dialogue(self) -> Dialogue:
        """A conversation; one text after another when the file has no template."""
        return _Conversation(self) if has_template(self.path) else _Texts(self)

    def text_of(self, tokens: list[int]) -> str:
        """Tokens as text."""
        return str(self._opened().detokenize(tokens))

    def tokens_of(self, text: str) -> list[int]:
        """A text as tokens, without one that starts it."""
        return [int(token) for token in self._opened().tokenize(text)]

    def time(self, prompt: int, new: int) -> EngineTimes:
        """Time ``prompt`` tokens and ``new`` ones after them, of which none ends the text.

        The engine is loaded for each call, which is not in the figures; packed weights are kept on disk meanwhile.

        Raises `ArtifactError` when the engine refuses the model.
        """
        from litert_lm import Backend, Benchmark

        _quiet()
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="edgeship-litert-lm-")
        benchmark = Benchmark(
            str(self.path), backend=Backend.CPU(thread_count=THREADS), prefill_tokens=prompt, decode_tokens=new,
            cache_dir=self._folder.name,
        )  # fmt: skip
        try:
            found = benchmark.run()
        except RuntimeError as error:
            raise self.stopped(error) from None
        if found.last_prefill_token_count != prompt or found.last_decode_token_count < 1:
            raise ArtifactError(
                f"LiteRT-LM took {found.last_prefill_token_count} of {prompt} tokens and wrote "
                f"{found.last_decode_token_count}",
                fix="give a shorter prompt, or build with a longer --context",
            )
        return EngineTimes(
            prompt / found.last_prefill_tokens_per_second,
            found.time_to_first_token_in_second,
            1 / found.last_decode_tokens_per_second,
            found.last_decode_token_count,
        )

    def conversation(self) -> Any:
        """A new conversation. Raises `ArtifactError` when the engine refuses."""
        engine = self._opened()
        try:
            return engine.create_conversation()
        except RuntimeError as error:
            raise self.stopped(error) from None

    @property
    def starts(self) -> int:
        """How many tokens the engine puts before a text."""
        return int(self._opened().bos_token_id is not None)

    def close(self) -> None:
        """Free the engine and its files."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _opened(self) -> Any:
        from litert_lm import Backend, Engine

        if self._engine is None:
            _quiet()
            try:
                self._engine = Engine(str(self.path), backend=Backend.CPU(thread_count=THREADS), cache_dir=NO_CACHE)
            except RuntimeError as error:
                raise self.stopped(error) from None
        return self._engine

    def stopped(self, error: Exception) -> ArtifactError:
        """What the engine's own error is to edgeship."""
        return ArtifactError(f"LiteRT-LM stopped at {self.path.name}: {error}", fix="check the input, or build again")


class _Conversation(Dialogue):
    """LiteRT-LM's Conversation, which keeps the turns and its cache itself."""

    interface = "LiteRT-LM's Conversation"
    whole = False

    def __init__(self, engine: TextEngine) -> None:
        self._engine = engine
        self._talk = engine.conversation()

    def say(self, text: str, limit: int) -> Answer:
        """A message, and the answer to it."""
        try:
            heard = str(self._talk.render_message_to_string(text))
            before = int(self._talk.token_count)
            said = str(self._talk.send_message(text, max_output_tokens=limit))
            taken = int(self._talk.token_count) - before - len(self._engine.tokens_of(heard))
        except RuntimeError as error:
            raise self._engine.stopped(error) from None
        if not before:
            taken -= self._engine.starts
        # The token that ends an answer counts, when the model wrote it.
        ended = taken > len(self._engine.tokens_of(said)) and taken <= limit
        return Answer(heard, said, taken - 1 if ended else taken, ended)

    def close(self) -> None:
        """End the conversation."""
        self._talk.close()


class _Texts(Dialogue):
    """LiteRT-LM's session, a new one for each text."""

    interface = "LiteRT-LM's Session"

    def __init__(self, engine: TextEngine) -> None:
        self._engine = engine

    def say(self, text: str, limit: int) -> Answer:
        """The continuation of a text."""
        said = self._engine.write(text, limit)
        tokens = len(self._engine.tokens_of(said))
        return Answer(text, said, tokens, tokens < limit)


def has_template(path: Path) -> bool:
    """Whether a checked file has a chat template."""
    from edgeship.compat.litert import metadata_proto

    found = metadata_proto().LlmMetadata()
    found.ParseFromString(read_content(path, read_sections(path)["LlmMetadataProto"]))
    return bool(found.jinja_prompt_template)


def _quiet() -> None:
    from litert_lm import LogSeverity, set_min_log_severity

    set_min_log_severity(LogSeverity.ERROR)
