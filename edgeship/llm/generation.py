"""Generate text with a model that answers one step at a time, and judge whether it is stuck."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeship.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# A tail that repeats one cycle this often is a loop, whatever the cycle's length up to this many tokens.
LOOP_REPEATS = 4
LOOP_LENGTH = 16


def never() -> bool:
    """Nobody asks to stop."""
    return False


class Stepper(ABC):
    """A language model with its cache: tokens in, logits out, one text at a time.

    Attributes:
        chunk: tokens that `prefill` takes at once. context: positions in the cache. position: those filled.
    """

    chunk: int
    context: int
    position: int = 0

    @abstractmethod
    def reset(self) -> None:
        """Forget the text."""

    @abstractmethod
    def prefill(self, tokens: Sequence[int]) -> None:
        """Take exactly `chunk` tokens into the cache; their logits are not asked for."""

    @abstractmethod
    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """Take one token; logits ``[vocabulary]`` of the next."""

    def decode_each(self, tokens: Sequence[int]) -> list[npt.NDArray[np.float32]]:
        """Take tokens that are known already; logits after each. Engines that can may take them together.

        [vocabulary] each.
        """
        return [self.decode(token) for token in tokens]

    def read(self, tokens: Sequence[int], stopped: Callable[[], bool] = never) -> npt.NDArray[np.float32] | None:
        """Take a prompt: whole chunks by `prefill`, the rest token by token. Logits after the last one.

        [vocabulary].

        Args:
            stopped: asked between steps; None is answered when it says so.

        Raises:
            UsageError: an empty prompt, or one longer than what is left of the context.
        """
        self._refuse(tokens)
        start = 0
        # The last token is left to decode, which has the head.
        for chunk in self.chunks:
            while len(tokens) - 1 - start >= chunk > 1:
                if stopped():
                    return None
                self.prefill(tokens[start : start + chunk])
                start += chunk
        for token in tokens[start:-1]:
            if stopped():
                return None
            self.decode(token)
        return self.decode(tokens[-1])

    @property
    def chunks(self) -> tuple[int, ...]:
        """How many tokens `prefill` takes, the most first."""
        return (self.chunk,)

    def _refuse(self, tokens: Sequence[int]) -> None:
        """Refuse a prompt that cannot be read."""
        if not tokens:
            raise UsageError("the prompt is empty", fix="give at least one token")
        if self.position + len(tokens) > self.context:
            raise UsageError(
                f"{self.position + len(tokens)} tokens do not fit the context of {self.context}",
                fix="build with a longer --context, or give a shorter text",
            )


def likeliest(logits: npt.NDArray[np.float32]) -> int:
    """The token that a greedy reader takes. ``logits`` [vocabulary]."""
    return int(logits.argmax())


def sampler(temperature: float, top_k: int, seed: int) -> Callable[[npt.NDArray[np.float32]], int]:
    """Draws among the ``top_k`` likeliest tokens, by ``softmax(logits / temperature)``; greedy at temperature 0.

    Raises `UsageError` for a negative temperature or no tokens to draw from.

    ``logits`` [vocabulary].
    """
    import numpy as np

    if temperature < 0 or top_k < 1:
        raise UsageError("nothing can be drawn so", fix="give a temperature of 0 or more, and top-k of 1 or more")
    if temperature == 0:
        return likeliest
    generator = np.random.default_rng(seed)

    def draw(logits: npt.NDArray[np.float32]) -> int:
        """``logits`` [vocabulary]."""
        best = np.argsort(logits)[-top_k:]
        weights = np.exp((logits[best] - logits[best].max()).astype(np.float64) / temperature)
        return int(generator.choice(best, p=weights / weights.sum()))

    return draw


def generate(
    model: Stepper,
    prompt: Sequence[int],
    limit: int,
    eos: Sequence[int] = (),
    pick: Callable[[npt.NDArray[np.float32]], int] = likeliest,
    stopped: Callable[[], bool] = never,
) -> Iterator[int]:
    """The next tokens, one by one, until one of ``eos``, ``limit`` tokens, or the end of the context.

    Args:
        pick: chooses a token from logits ``[vocabulary]``. stopped: asked between steps; nothing
            more comes when it says so.
    """
    logits = model.read(prompt, stopped)
    for count in range(1, limit + 1):
        if logits is None or stopped():
            return
        token = pick(logits)
        yield token
        if token in eos or count == limit or model.position >= model.context:
            return
        logits = model.decode(token)


def score(model: Stepper, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits ``[T, vocabulary]`` after each token of a text, through every function that the artifact has.

    The first chunk is decoded token by token for its logits, then taken again by `prefill`, whose cache the rest of the
    text is decoded with: an error in either shows.

    Raises `UsageError` when the text is longer than the cache.
    """
    import numpy as np

    if len(tokens) > model.context:
        raise UsageError(
            f"a text of {len(tokens)} tokens does not fit a cache of {model.context} positions",
            fix="give a longer --context, or shorter texts with --set load/decoder.tokens",
        )
    model.reset()
    head = model.chunk if len(tokens) > model.chunk > 1 else 0
    rows = model.decode_each(tokens[:head])
    if head:
        model.reset()
        model.prefill(tokens[:head])
    rows += model.decode_each(tokens[head:])
    return np.stack(rows)


@dataclass(frozen=True)
class Loop:
    """The end of a text repeats ``cycle`` ``times`` times."""

    cycle: tuple[int, ...]
    times: int


def find_loop(tokens: Sequence[int]) -> Loop | None:
    """The cycle that a text ends in when it is stuck, or None: at least four times the same one to sixteen tokens."""
    for length in range(1, LOOP_LENGTH + 1):
        cycle = tuple(tokens[-length:])
        times = 0
        while (start := len(tokens) - (times + 1) * length) >= 0 and tuple(tokens[start : start + length]) == cycle:
            times += 1
        if times >= LOOP_REPEATS and length * times >= LOOP_LENGTH:
            return Loop(cycle, times)
    return None
