"""A cache of fixed length as transformers' models see it: keys and values are tensors that somebody else owns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache

# write(cache [1, H, L, D], new rows [1, H, T, D], position []) -> the cache with the rows at position ..
Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class FixedCache(Cache):  # type: ignore[misc]
    """Keys and values of fixed length ``L``, written at a position that is known at run time.

    Args:
        keys, values: one tensor ``[1, kv_heads, L, head_dim]`` a layer; replaced in the lists when written.
        position: a scalar: where the first of the new tokens goes.
        write: how new rows enter; runtimes differ in what they hold.
    """

    def __init__(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], position: torch.Tensor, write: Write
    ) -> None:
        super().__init__(layers=[])
        self.keys, self.values = list(keys), list(values)
        self.position, self.write = position, write
        self.length = self.keys[0].shape[2]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one layer's new rows; returns its whole keys and values."""
        self.keys[layer_idx] = self.write(self.keys[layer_idx], key_states, self.position)
        self.values[layer_idx] = self.write(self.values[layer_idx], value_states, self.position)
        return self.keys[layer_idx], self.values[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Unknown while tracing; positions are given to the model instead."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Masks cover the whole cache."""
        return self.length, 0

    def get_query_offset(self, layer_idx: int = 0) -> torch.Tensor:
        """The position of the first new token."""
        return self.position


def write_by_select(cache: torch.Tensor, rows: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Write rows with gather and select alone, which every runtime has. The cache is copied."""
    tokens = rows.shape[2]
    index = torch.arange(cache.shape[2]) - position
    inside = ((index >= 0) & (index < tokens))[None, None, :, None]
    if tokens == 1:
        return torch.where(inside, rows, cache)
    return torch.where(inside, rows.index_select(2, index.clamp(0, tokens - 1)), cache)
