"""The modules that are exported: a whole text without a cache (the reference), and a step with explicit caches."""

from __future__ import annotations

from typing import Any

import torch

from edgeship.llm.cache import FixedCache, Write, write_by_select


class Whole(torch.nn.Module):
    """``tokens [1, T] -> logits [1, T, vocabulary]``: the model as it is defined, without a cache."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits after each token."""
        logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


class Step(torch.nn.Module):
    """One step with caches as inputs and outputs.

    ``(tokens [1, T], position [], k_0 .. k_n, v_0 .. v_n) -> (logits [1, T, vocabulary], k_0 .. v_n)`` with caches
    ``[1, kv_heads, L, head_dim]``. Rows beyond the last real token may hold anything: they are masked by position, and
    written over before a token may see them.

    Args:
        logits: False leaves the head out (and all that only the head reads), as a prefill step wants.
    """

    def __init__(self, model: Any, layers: int, *, logits: bool = True, write: Write = write_by_select) -> None:
        super().__init__()
        self.model = model
        self.layers, self.logits, self.write = layers, logits, write

    def forward(self, tokens: torch.Tensor, position: torch.Tensor, *caches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run ``T`` tokens from ``position`` on."""
        cache = FixedCache(caches[: self.layers], caches[self.layers :], position.reshape(()), self.write)
        answer = run(self.model, tokens, cache, logits=self.logits)
        head = () if answer is None else (answer,)
        return (*head, *cache.keys, *cache.values)


def run(model: Any, tokens: torch.Tensor, cache: FixedCache, *, logits: bool = True) -> torch.Tensor | None:
    """Run a transformers decoder over a cache; the logits, or None without its head."""
    positions = (torch.arange(tokens.shape[1]) + cache.position)[None]
    inputs = {"input_ids": tokens, "position_ids": positions, "past_key_values": cache, "use_cache": True}
    if logits:
        found: torch.Tensor = model(**inputs).logits
        return found
    getattr(model, model.base_model_prefix)(**inputs)
    return None
