"""Attention and masks in the one form that every runtime can hold, plugged into transformers' own interfaces.

transformers looks up attention and masks by ``config._attn_implementation``, so a model runs here as its authors wrote
it, and only how scores and masks are computed is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

NAME = "edgeship"
# Vanishes in a softmax; a score added to it stays finite in float16. Minus infinity breaks Hexagon and float16 both.
MASK = -1e4
# While `observed` is open: layer -> (query heads, key and value heads, head width).
_seen: list[dict[int, tuple[int, int, int]]] = []


@contextmanager
def observed() -> Iterator[dict[int, tuple[int, int, int]]]:
    """The heads of every layer that attends inside the block."""
    _seen.append({})
    try:
        yield _seen[-1]
    finally:
        _seen.pop()


def register() -> None:
    """Make ``attn_implementation="edgeship"`` known to transformers. Safe to call again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, additive_mask)
    from transformers.models.falcon import modeling_falcon

    # Falcon picks a class by name; `edgeship.llm.modules` lets it attend through the interface.
    modeling_falcon.FALCON_ATTENTION_CLASSES[NAME] = modeling_falcon.FalconAttention


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention without repeating keys and values: the query heads of a group are rows of one product.

    Args:
        query: ``[1, heads, T, D]``. key, value: ``[1, kv_heads, L, D]``.
        attention_mask: ``[1, 1, T, L]``, added to the scores; None lets every token see every other.
        position_bias: ``[1, heads, T, L]``, added too (T5).

    Returns:
        ``[1, T, heads, D]`` and no weights.
    """
    heads, tokens, width = (int(size) for size in query.shape[1:])
    kv_heads = int(key.shape[1])
    group = heads // kv_heads
    for found in _seen:
        found[cast("int", module.layer_idx)] = (heads, kv_heads, width)
    scaling = width**-0.5 if scaling is None else scaling
    rows = query.reshape(1, kv_heads, group * tokens, width)
    scores = torch.matmul(rows, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias.reshape(1, kv_heads, group * tokens, -1)
    if attention_mask is not None:
        scores = scores + attention_mask.repeat(1, 1, group, 1)
    mixed = torch.matmul(torch.softmax(scores, dim=-1), value)
    return mixed.reshape(1, heads, tokens, value.shape[-1]).transpose(1, 2), None


def additive_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """A mask ``[1, 1, q_length, kv_length]``: 0 where a token may look, -1e4 where not.

    Args:
        q_offset: position of the first query; a tensor when it is known only at run time.
        mask_function: ``(batch, head, query position, key position) -> bool``: causal, or within a sliding window.
        attention_mask: ``[1, kv_length]``: keys that count, where the text is shorter than its tensor.
    """
    queries = torch.arange(q_length)[:, None] + q_offset
    keys = torch.arange(kv_length)[None, :] + kv_offset
    seen = mask_function(0, 0, queries, keys)
    if attention_mask is not None:
        seen = seen & attention_mask.bool()
    return torch.where(seen, 0.0, MASK)[None, None]
