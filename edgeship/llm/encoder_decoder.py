"""An encoder-decoder as two networks that any runtime takes, and the host that writes with them.

    encoder: what the model takes ..                        -> cross_k_i, cross_v_i f32[1, heads, S, head_dim]
    decoder: decoder_input_ids i64[1, 1], position i64[1],
             (attention_mask i64[1, S]), cross_k_i, cross_v_i,
             k_i, v_i f32[1, heads, L, head_dim]            -> logits f32[1, 1, vocabulary], k_new_i, v_new_i

The encoder runs once: the keys and values that every layer of the decoder attends to are its answer. The decoder runs
for every token; its host writes the new rows into the caches at ``position``. Nothing is rewritten: both are
transformers' own model over its own cache interface.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgeship.core.model import TensorSpec
from edgeship.errors import UsageError
from edgeship.llm.attention import NAME, register
from edgeship.llm.cache import FixedCache, write_by_select
from edgeship.llm.generation import Stepper

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from edgeship.core.runtimes import Session

# Inputs that both networks may take: what of the text that is read counts.
MASK = "attention_mask"


class EncoderNetwork(nn.Module):
    """Inputs of the encoder to keys and values for the decoder.

    Args:
        model: transformers' encoder-decoder. names: of its inputs, in order.
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Read once."""
        return self.attended(self.read(*inputs))

    def read(self, *inputs: torch.Tensor) -> torch.Tensor:
        """What the encoder itself answers, ``[1, S, width]``."""
        answer: torch.Tensor = self.model.get_encoder()(**dict(zip(self.names, inputs, strict=True))).last_hidden_state
        return answer

    def attended(self, read: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The keys and values that the decoder makes of it."""
        from transformers import EncoderDecoderCache

        kept = _Kept()
        # What a first token would attend to; the token itself has no part in it, and is gone from the export.
        first = torch.zeros((1, 1), dtype=torch.int64)
        cache = EncoderDecoderCache(_Kept(), kept)
        self.model.get_decoder()(input_ids=first, encoder_hidden_states=read, past_key_values=cache, use_cache=True)
        layers = sorted(kept.rows)
        return (*(kept.rows[i][0] for i in layers), *(kept.rows[i][1] for i in layers))


class DecoderStep(nn.Module):
    """One token with the keys and values of what was read and of what was written so far.

    Args:
        layers: of the decoder. width: of what the encoder answers. masked: whether an ``attention_mask`` is given.
    """

    def __init__(self, model: Any, layers: int, width: int, *, masked: bool) -> None:
        super().__init__()
        self.model, self.layers, self.width, self.masked = model, layers, width, masked

    def forward(self, token: torch.Tensor, position: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Write one token."""
        from transformers import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        mask, rest = (rest[0], rest[1:]) if self.masked else (None, rest)
        cross_keys, cross_values, keys, values = (rest[i * self.layers : (i + 1) * self.layers] for i in range(4))
        own = _Written(keys, values, position)
        length = int(cross_keys[0].shape[2])
        read = BaseModelOutput(last_hidden_state=torch.zeros(1, length, self.width))
        # All of the cache counts: what is not written yet is hidden by its position.
        all_of_it = torch.ones((1, own.length), dtype=torch.int64)
        answer = self.model(
            decoder_input_ids=token, decoder_attention_mask=all_of_it, encoder_outputs=read, use_cache=True,
            past_key_values=EncoderDecoderCache(own, _Read(cross_keys, cross_values)),
            **({MASK: mask} if self.masked else {}),
        )  # fmt: skip
        rows = [own.rows[i] for i in range(self.layers)]
        return (answer.logits, *(row[0] for row in rows), *(row[1] for row in rows))


class _Kept(FixedCache):
    """Passes keys and values on, and remembers them."""

    def __init__(self) -> None:
        nothing = torch.zeros(1, 1, 0, 1)
        super().__init__([nothing], [nothing], torch.zeros((), dtype=torch.int64), write_by_select)
        self.rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.rows[layer_idx] = key_states, value_states
        return key_states, value_states

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


class _Read(FixedCache):
    """Keys and values of what was read; models take them from ``layers`` once told that they are there."""

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        super().__init__(keys, values, torch.zeros((), dtype=torch.int64), write_by_select)
        self.layers = [SimpleNamespace(keys=k, values=v) for k, v in zip(keys, values, strict=True)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


class _Written(FixedCache):
    """What was written so far, with the new row in its place; the row is kept for the host."""

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], position: torch.Tensor) -> None:
        super().__init__(keys, values, position, write_by_select)
        self.rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.rows[layer_idx] = key_states, value_states
        return super().update(key_states, value_states, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        # Models count positions from it: T5's distances, Whisper's table.
        return self.position


def positions_of(config: Any) -> int | None:
    """The longest text that a decoder writes, as its configuration says; None when positions have no table."""
    names = ("max_target_positions", "max_decoder_position_embeddings", "max_position_embeddings")
    known = (getattr(config, name, None) for name in names)
    return next((int(number) for number in known if number), None)


def encoder_of(model: Any, specs: Sequence[TensorSpec]) -> tuple[EncoderNetwork, list[str]]:
    """The encoder, and the names of what it answers.

    Args:
        specs: of the encoder's inputs.
    """
    _plug_in(model)
    layers = range(len(_attended(model, specs)[0]) // 2)
    return EncoderNetwork(model, [spec.name for spec in specs]), [f"cross_{kind}_{i}" for kind in "kv" for i in layers]


def decoder_of(
    model: Any, specs: Sequence[TensorSpec], context: int
) -> tuple[DecoderStep, list[TensorSpec], list[str]]:
    """A step of the decoder over ``context`` positions, what it takes, and the names of what it answers.

    Args:
        specs: of the encoder's inputs.
    """
    _plug_in(model)
    crossed, width = _attended(model, specs)
    layers = len(crossed) // 2
    mask = [spec for spec in specs if spec.name == MASK]
    inputs = [
        # A configuration of two models has no vocabulary of its own.
        TensorSpec("decoder_input_ids", "i64", (1, 1), low=0, high=len(model.get_output_embeddings().weight) - 1),
        TensorSpec("position", "i64", (1,), low=0, high=context - 1),
        *mask,
    ]
    for name, length in (("cross_", None), ("", context)):
        for place, value in enumerate(crossed):
            heads, read, head = (int(size) for size in value.shape[1:])
            shape = (1, heads, read if length is None else length, head)
            inputs.append(TensorSpec(f"{name}{'kv'[place // layers]}_{place % layers}", "f32", shape))
    outputs = ["logits", *(f"{kind}_new_{i}" for kind in "kv" for i in range(layers))]
    return DecoderStep(model, layers, width, masked=bool(mask)), inputs, outputs


def _plug_in(model: Any) -> None:
    register()
    model.set_attn_implementation(NAME)


def _attended(model: Any, specs: Sequence[TensorSpec]) -> tuple[tuple[torch.Tensor, ...], int]:
    """Keys and values for the decoder, of inputs that say nothing, for their number and shapes; the encoder's width.

    Raises `SourceError` when the model does not run on inputs of these sizes.
    """
    from edgeship.data.specs import example_tensors
    from edgeship.program.export import does_not_run

    network = EncoderNetwork(model, [spec.name for spec in specs])
    with torch.no_grad():
        try:
            read = network.read(*example_tensors(specs))
            return network.attended(read), int(read.shape[-1])
        except Exception as error:
            raise does_not_run(specs, error) from error


class EncoderDecoder(Stepper):
    """Writes with two networks that are open in any runtime, from the encoder's inputs to one token after another.

    Args:
        encoder, decoder: sessions of the two. specs: of the decoder's inputs, as its signature has them.

    With `edgeship.llm.generation.generate` and the model's first tokens as the prompt it writes greedily or by drawing.

    Attributes:
        recording: whether to keep what the decoder is given, step by step, in ``steps``; see `save_steps`.
    """

    recording = False

    def __init__(self, encoder: Session, decoder: Session, specs: Sequence[TensorSpec]) -> None:
        import numpy as np

        self._encoder, self._decoder = encoder, decoder
        self._dtypes = {spec.name: spec.numpy_dtype for spec in specs}
        self._caches = {
            spec.name: np.zeros(spec.shape, np.float32) for spec in specs if spec.name.partition("_")[0] in ("k", "v")
        }
        self._given: dict[str, npt.NDArray[Any]] = {}
        self.steps: list[dict[str, npt.NDArray[Any]]] = []
        self.context, self.chunk = next(iter(self._caches.values())).shape[2], 1

    def take(self, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
        """Read a text or a sound; what is written from here on is about it.

        Shapes are those of the encoder's signature.
        """
        self._given = dict(self._encoder.run(inputs))
        self._given |= {name: value for name, value in inputs.items() if name == MASK}
        self.reset()

    def reset(self) -> None:
        """Begin to write anew, about the same."""
        self.position = 0

    def prefill(self, tokens: Sequence[int]) -> None:
        """Take a token whose logits are not asked for."""
        for token in tokens:
            self.decode(token)

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """Take one token; logits of the next. Raises `UsageError` when nothing was read, or the context is full.

        [vocabulary].
        """
        import numpy as np

        if not self._given:
            raise UsageError("there is nothing to write about yet", fix="give the encoder's inputs to take() first")
        if self.position >= self.context:
            raise UsageError(
                f"the context of {self.context} tokens is full", fix="build the decoder with a longer --context"
            )

        step = {"decoder_input_ids": np.array([[token]]), "position": np.array([self.position])}
        given = {**step, **self._given, **self._caches}
        inputs = {name: given[name].astype(kind) for name, kind in self._dtypes.items()}
        if self.recording:
            self.steps.append(inputs)
        answers = self._decoder.run(inputs)
        for name, cache in self._caches.items():
            kind, _, layer = name.partition("_")
            cache[:, :, self.position] = answers[f"{kind}_new_{layer}"][:, :, 0]
        self.position += 1
        return np.asarray(answers["logits"], np.float32).reshape(-1)

    def save_steps(self, path: Path) -> None:
        """Write what was recorded as data for ``build --part decoder --calibration``: ``.npz``, a row a step."""
        import numpy as np

        if not self.steps:
            raise UsageError("no step was recorded", fix="set recording = True before writing")
        arrays: dict[str, Any] = {}
        for name in self.steps[0]:
            # [steps, ...]
            arrays[name] = np.stack([step[name] for step in self.steps])
        np.savez(path, allow_pickle=False, **arrays)
