"""Artifacts that are open in their engine: a network that is called, a language model that writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from edgeship.core.artifact import ArtifactRecord
from edgeship.core.model import Signature, TensorSpec
from edgeship.core.records import suggest
from edgeship.core.registry import runtimes
from edgeship.core.runtimes import Session, as_numpy
from edgeship.core.units import counted
from edgeship.engine.chatter import hushed
from edgeship.errors import ArtifactError, DataError, EncodingError, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeship.conversation import Conversation

    Array = npt.NDArray[Any]

# Of an answer, where nothing else is said.
MAX_TOKENS = 256


class _Open:
    """What is open until it is closed, by hand or by a ``with`` block."""

    def __init__(self, title: str, stack: ExitStack) -> None:
        self.title, self._stack, self._closed = title, stack, False

    def close(self) -> None:
        """Free what the engine holds."""
        self._closed = True
        self._stack.close()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise UsageError(f"{self.title} is closed", fix="open it again")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Network(_Open):
    """A network in its engine: ``network(image=x)`` answers an array, or a dict of them where it has several outputs.

    Inputs are arrays, tensors or nested lists; a missing batch axis of 1 is added, other floats are converted.
    """

    def __init__(self, session: Session, signature: Signature, title: str, stack: ExitStack) -> None:
        super().__init__(title, stack)
        self.session, self.signature = session, signature

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it takes, in order."""
        return self.signature.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it answers, in order."""
        return self.signature.outputs

    def __call__(self, *args: Any, **named: Any) -> Array | dict[str, Array]:
        """Run once, with the inputs in order or by name: the only output, or all by name.

        Raises:
            UsageError: another number of inputs, or a name that it has not.
            DataError: a shape or numbers that do not fit.
        """
        if len(args) == 1 and isinstance(args[0], Mapping) and not named:
            return self._only(self.run(args[0]))
        names = [spec.name for spec in self.inputs]
        if len(args) > len(names):
            raise UsageError(
                f"{self.title} takes {counted(len(names), 'input')}, not {len(args)}", fix=f"give {', '.join(names)}"
            )
        twice = next((name for name in names[: len(args)] if name in named), None)
        if twice is not None:
            raise UsageError(f"the input {twice} is given twice", fix="give it by place or by name")
        return self._only(self.run({**dict(zip(names, args, strict=False)), **named}))

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """Run once: every output by name, whatever their number. Errors as in `__call__`."""
        import numpy as np

        self._refuse_closed()
        known = {name for spec in self.inputs for name in spec.spellings}
        strange = next((name for name in inputs if name not in known), None)
        if strange is not None:
            raise UsageError(f"{self.title} has no input {strange}", fix=suggest(str(strange), known))
        ready = {spec.name: self._fitted(spec, inputs) for spec in self.inputs}
        # Some engines answer a plain number where an output has no axes.
        return {name: np.asarray(value) for name, value in self.session.run(ready).items()}

    def _fitted(self, spec: TensorSpec, inputs: Mapping[str, Any]) -> Array:
        """One input in the artifact's own shape and dtype."""
        import numpy as np

        from edgeship.data.memory import as_array

        value = spec.of(inputs)
        if value is None:
            listed = ", ".join(map(str, self.inputs))
            raise UsageError(f"{self.title} lacks the input {spec.name}", fix=f"it takes {listed}")
        array = as_array(spec.name, value)
        if tuple(array.shape) == spec.shape[1:] and spec.shape[:1] == (1,):
            array = array[None]
        if tuple(array.shape) != spec.shape:
            raise DataError(
                f"{spec.name} has shape {tuple(array.shape)}, {self.title} takes {spec}", fix="call it once a sample"
            )
        if spec.dtype not in ("f32", "f16") and np.issubdtype(array.dtype, np.floating):
            raise DataError(f"{spec.name} is {array.dtype}, {self.title} takes {spec}", fix="convert it first")
        try:
            return as_numpy(array, spec.numpy_dtype)
        except EncodingError as error:
            raise DataError(f"{spec.name}: {error.what}", fix=f"{self.title} takes {spec}") from None

    def _only(self, outputs: dict[str, Array]) -> Array | dict[str, Array]:
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def __repr__(self) -> str:
        return f"<Network {self.title}: {', '.join(map(str, self.inputs))} -> {', '.join(map(str, self.outputs))}>"


class LanguageModel(_Open):
    """A language model in its engine: `generate` continues a text, `chat` answers in the model's own template."""

    def __init__(self, talk: Conversation, stack: ExitStack) -> None:
        super().__init__(talk.title, stack)
        self._talk = talk
        self._template = talk.templated

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is to be said of the last answer: that it was cut off, or that the oldest messages are forgotten."""
        return tuple(self._talk.remarks)

    def __call__(self, prompt: str, max_tokens: int = MAX_TOKENS) -> str:
        """`generate`."""
        return self.generate(prompt, max_tokens)

    def generate(
        self, prompt: str, max_tokens: int = MAX_TOKENS, *, temperature: float = 0.0, top_k: int = 40, seed: int = 0
    ) -> str:
        """The text that follows a prompt, at most ``max_tokens`` long. ``temperature`` 0 takes the likeliest tokens."""
        return "".join(self.stream(prompt, max_tokens, temperature=temperature, top_k=top_k, seed=seed))

    def stream(
        self, prompt: str, max_tokens: int = MAX_TOKENS, *, temperature: float = 0.0, top_k: int = 40, seed: int = 0
    ) -> Iterator[str]:
        """`generate`, piece by piece as it is written."""
        self._choose(max_tokens, temperature, top_k, seed)
        turns, self._talk.turns = self._talk.turns, []
        self._talk.templated = False
        try:
            yield from self._talk.say(prompt, max_tokens)
        finally:
            self._talk.turns, self._talk.templated = turns, self._template

    def chat(
        self, message: str, max_tokens: int = MAX_TOKENS, *, temperature: float = 0.0, top_k: int = 40, seed: int = 0
    ) -> str:
        """The answer to a message; what was said before is kept until `reset`."""
        self._choose(max_tokens, temperature, top_k, seed)
        with closing(self._talk.say(message, max_tokens)) as pieces:
            return "".join(pieces)

    def reset(self) -> None:
        """Forget what was said in `chat`."""
        self._talk.reset()

    def _choose(self, max_tokens: int, temperature: float, top_k: int, seed: int) -> None:
        from edgeship.llm.generation import sampler

        self._refuse_closed()
        if max_tokens < 1:
            raise UsageError(f"--max-tokens {max_tokens} writes nothing", fix="give at least 1")
        self._talk.pick = sampler(temperature, top_k, seed)

    def __repr__(self) -> str:
        return f"<LanguageModel {self.title}>"


def open_artifact(bundle: Path, record: ArtifactRecord, adapter: str = "") -> Network | LanguageModel:
    """Open an artifact of a bundle as an app does.

    Raises:
        ArtifactError: a file was changed, or another build put its own in the place of the bundle.
    """
    from edgeship.shipping.bundle import check_whole, opened, read_bundle

    engine = runtimes()[record.runtime]
    whole = read_bundle(bundle)
    if record not in whole.manifest.artifacts:
        raise ArtifactError(
            f"{bundle} was replaced by another build", fix="open it again, or build into another output"
        )
    with ExitStack() as stack, hushed():
        if engine.engine.for_language:
            from edgeship.conversation import open_talk

            return LanguageModel(stack.enter_context(open_talk(bundle, record, adapter=adapter)), stack.pop_all())
        if adapter:
            raise UsageError(f"{engine.title} runs a network, which has no adapters", fix="leave adapter out")
        check_whole(whole)
        engine.versions()
        session = stack.enter_context(engine.open_fast(opened(whole, record)))
        return Network(session, record.signature, record.main, stack.pop_all())
