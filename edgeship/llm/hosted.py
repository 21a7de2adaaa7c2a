"""What a host does for steps without positions, masks or caches of their own: it makes them, and keeps the caches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from edgeship.llm.generation import Stepper

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeship.core.decoder import Decoder

# Added to the scores of what a token must not see; the grid of the sum ends far above it (`compression.calibrate`).
MASKED = -1000.0


class Host:
    """The host's side of a step: its inputs from tokens and a position, and the caches.

    Args:
        shapes: of the caches ``k_<i>`` and ``v_<i>``, ``[1, kv_heads, context, head_dim]``.
        windows: how many positions tokens see, of every kind of layer; None for all.
        angles: ``cos_<kind>`` and ``sin_<kind>`` -> ``[context, width]``; empty when the model looks positions up.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        windows: Iterable[int | None],
        angles: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        self.shapes, self.angles = dict(shapes), dict(angles)
        self.windows = sorted(set(windows), key=lambda window: window or 0)
        self.context = next(iter(self.shapes.values()))[2]
        self.reset()

    @classmethod
    def of(cls, decoder: Decoder, context: int, angles: Mapping[str, npt.NDArray[Any]]) -> Self:
        """The host of a model."""
        shapes = {
            f"{kind}_{i}": (1, layer.kv_heads, context, layer.head_dim)
            for kind in "kv"
            for i, layer in enumerate(decoder.layers)
        }
        return cls(shapes, [layer.window for layer in decoder.layers], angles)

    def reset(self) -> None:
        """Empty caches."""
        import numpy as np

        self.caches = {name: np.zeros(shape, np.float32) for name, shape in self.shapes.items()}
        self.position = 0

    def inputs(self, tokens: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
        """What a step takes for these tokens at the present position, in the order of its inputs."""
        import numpy as np

        places = np.arange(self.position, self.position + len(tokens))
        given: dict[str, npt.NDArray[Any]] = {"input_ids": np.array([tokens], np.int32)}
        if not self.angles:
            given["positions"] = places[None].astype(np.int32)
        given |= {name: table[places][None] for name, table in self.angles.items()}
        given |= {mask_name(window): self._mask(places, window) for window in self.windows}
        return {**given, **self.caches}

    def take(self, answers: Mapping[str, npt.NDArray[Any]], tokens: int) -> None:
        """Write the new rows into the caches, and go on by as many positions."""
        for name, cache in self.caches.items():
            kind, _, layer = name.partition("_")
            cache[:, :, self.position : self.position + tokens] = answers[f"{kind}_new_{layer}"]
        self.position += tokens

    def _mask(self, places: npt.NDArray[Any], window: int | None) -> npt.NDArray[Any]:
        """``[1, 1, T, context + T]``: rows of the cache that are filled, then the tokens themselves."""
        import numpy as np

        cached = np.arange(self.context)
        # A row that is not filled yet stands at no position that a token may see.
        others = np.concatenate([np.where(cached < self.position, cached, self.context + places[-1] + 1), places])
        distance = places[:, None] - others[None]
        seen = (distance >= 0) & (distance < (window or self.context + 1))
        return np.where(seen, 0.0, MASKED).astype(np.float32)[None, None]


class HostedStepper(Stepper):
    """Two steps over the same host.

    Args:
        run: runs the step ``prefill`` or ``decode`` on its inputs by name, and answers by name.
    """

    def __init__(
        self,
        host: Host,
        chunk: int,
        run: Callable[[str, Mapping[str, npt.NDArray[Any]]], Mapping[str, npt.NDArray[Any]]],
    ) -> None:
        self._host, self._run_step = host, run
        self.context, self.chunk = host.context, chunk

    def reset(self) -> None:
        """Forget the text."""
        self._host.reset()
        self.position = 0

    def prefill(self, tokens: Sequence[int]) -> None:
        """Take a chunk."""
        self._run("prefill", tokens)

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """Take one token; logits of the next. [vocabulary]."""
        return self._run("decode", [token])["logits"].reshape(-1).astype("float32")

    def _run(self, step: str, tokens: Sequence[int]) -> Mapping[str, npt.NDArray[Any]]:
        answers = self._run_step(step, self._host.inputs(tokens))
        self._host.take(answers, len(tokens))
        self.position = self._host.position
        return answers


def mask_name(window: int | None) -> str:
    """The input that hides what layers with this window do not see."""
    return f"mask_{window or 'all'}"
