"""Caches as transformers' models see them: keys and values are tensors that somebody else owns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from transformers import Cache

from edgeship.core.decoder import StateForm
from edgeship.errors import UnsupportedOpError

# write(cache [1, H, L, D], new rows [1, H, T, D], position []) -> the cache with the rows at position ..
Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


# Added to a layer's number: its second cache, of keys that choose.
CHOOSING = 1 << 20
# Form, layer and place of a state, as `edgeship.core.decoder.FixedState` has them.
Key = tuple[StateForm, int, int]


class KeysAndValues(Cache):  # type: ignore[misc]
    """A cache of keys and values, and of states of fixed size where there are any. A model that keeps anything else
    there is refused in words.

    Args:
        numbers: by which the model names its caches -> their places; as they are when None.

    Attributes:
        masked: whether the model must be told that all of it counts.
        told: whether the model is told positions, where it asks for them.
        states: what layers keep beside keys and values; replaced when it is written.
        held: names of the attributes in which layers keep states themselves.
    """

    masked = False
    told = True
    states: dict[Key, torch.Tensor]
    held: dict[Key, str]

    def __init__(self, numbers: Mapping[int, int] | None = None) -> None:
        super().__init__(layers=[])
        self.numbers = numbers
        self.states, self.held = {}, {}

    def place(self, layer_idx: int) -> int:
        """The place of the cache that a model names by a number."""
        return layer_idx if self.numbers is None else self.numbers[layer_idx]

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Always where there are states: they begin as zeros, as before a text."""
        return bool(self.states)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Never: nothing is taken back."""
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The last inputs of a convolution, ``[1, channels, width]``. A model may change them in place."""
        return self._held("conv", layer_idx, state_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """Put new inputs ``[1, channels, T]`` behind the last ones; both together."""
        held = self._held("conv", layer_idx, state_idx)
        whole = torch.cat([held, conv_states], dim=-1)
        self.states["conv", layer_idx, state_idx] = whole[..., -int(held.shape[-1]) :]
        return whole

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """A sum over all tokens before, of any shape."""
        return self._held("recurrent", layer_idx, state_idx)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """Replace it."""
        self._held("recurrent", layer_idx, state_idx)
        self.states["recurrent", layer_idx, state_idx] = recurrent_states
        return recurrent_states

    def _held(self, form: StateForm, layer: int, place: int) -> torch.Tensor:
        found = self.states.get((form, layer, place))
        if found is None:
            what = "the last inputs of a convolution" if form == "conv" else "a recurrent state"
            raise _other_state(what)
        return found

    def update_indexer(self, rows: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Put new rows ``[1, T, D]`` to the keys by which a layer chooses the tokens that it attends to; all of them,
        ``[1, L, D]``. They are a cache of one head, whose values nobody reads."""
        keys: torch.Tensor = self.update(rows[:, None], rows[:, None], CHOOSING + layer_idx)[0]
        return keys[:, 0]


def _other_state(what: str) -> UnsupportedOpError:
    return UnsupportedOpError(
        f"a layer keeps {what} from token to token, and caches here hold keys and values alone",
        fix="take a model whose layers all attend",
    )


def widened(rows: torch.Tensor, width: int) -> torch.Tensor:
    """``[.., D]`` to ``[.., width]``, with zeros behind: what the narrower of keys and values is cached as.

    Any shape.
    """
    missing = width - int(rows.shape[-1])
    return rows if missing == 0 else torch.nn.functional.pad(rows, (0, missing))


def narrowed(cache: torch.Tensor, width: int) -> torch.Tensor:
    """The first ``width`` numbers of each row."""
    return cache if int(cache.shape[-1]) == width else cache[..., :width]


class FixedCache(KeysAndValues):
    """Keys and values of fixed length ``L``, written at a position that is known at run time.

    Args:
        keys, values: one tensor ``[1, kv_heads, L, head_dim]`` a layer; replaced in the lists when written. Narrower
            rows are widened to ``head_dim``, and read as narrow as they were.
        position: a scalar: where the first of the new tokens goes.
        write: how new rows enter; runtimes differ in what they hold.
        numbers: see `KeysAndValues`.
        counted: answer the position when the model asks how much there is; 0 otherwise, for models that are told their
            positions.
    """

    def __init__(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        position: torch.Tensor,
        write: Write,
        numbers: Mapping[int, int] | None = None,
        *,
        counted: bool = False,
    ) -> None:
        super().__init__(numbers)
        self.keys, self.values = list(keys), list(values)
        self.position, self.write, self.counted = position, write, counted
        self.length = self.keys[0].shape[2] if self.keys else 1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one layer's new rows ``[1, kv_heads, T, D]``; returns its whole keys and values."""
        place = self.place(layer_idx)
        found = []
        for caches, rows in ((self.keys, key_states), (self.values, value_states)):
            caches[place] = self.write(caches[place], widened(rows, caches[place].shape[-1]), self.position)
            found.append(narrowed(caches[place], rows.shape[-1]))
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """The position where the model counts it, which is a tensor; else positions are given to the model instead."""
        return self.position if self.counted else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Masks cover the whole cache."""
        return self.length, 0

    def get_query_offset(self, layer_idx: int = 0) -> torch.Tensor:
        """The position of the first new token."""
        return self.position


class GrowingCache(KeysAndValues):
    """Keys and values that new rows are put behind.

    Args:
        keys, values: by place, ``[1, kv_heads, S, head_dim]``; replaced when written. Rows are widened as in
            `FixedCache`.
        past: how many positions there are.
        apart: places whose rows are not put there: an operator of the engine does it, and attends.
    """

    def __init__(
        self,
        keys: dict[int, torch.Tensor],
        values: dict[int, torch.Tensor],
        past: int,
        numbers: Mapping[int, int] | None = None,
        apart: Collection[int] = (),
    ) -> None:
        super().__init__(numbers)
        self.keys, self.values, self.past, self.apart = keys, values, past, frozenset(apart)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put one layer's new rows ``[1, kv_heads, T, D]`` behind; returns its whole keys and values."""
        place = self.place(layer_idx)
        if place in self.apart:
            return key_states, value_states
        found = []
        for caches, rows in ((self.keys, key_states), (self.values, value_states)):
            caches[place] = torch.cat([caches[place], widened(rows, caches[place].shape[-1])], dim=2)
            found.append(narrowed(caches[place], rows.shape[-1]))
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions there are before the new ones."""
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Masks cover what there is and what is new."""
        return self.past + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The position of the first new token."""
        return self.past


def write_by_select(cache: torch.Tensor, rows: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Write rows with gather and select alone, which every runtime has. The cache is copied."""
    tokens = rows.shape[2]
    index = torch.arange(cache.shape[2]) - position
    inside = ((index >= 0) & (index < tokens))[None, None, :, None]
    if tokens == 1:
        return torch.where(inside, rows, cache)
    return torch.where(inside, rows.index_select(2, index.clamp(0, tokens - 1)), cache)
