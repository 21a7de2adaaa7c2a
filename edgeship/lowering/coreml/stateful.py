"""A transformers decoder as a module with a memory: its caches are buffers, which become Core ML's states.

What float16 cannot do is written otherwise here: angles of rotations come from tables, queries are scaled before they
are multiplied, and norms divide by the largest value before they square.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from edgeship.errors import LoweringError
from edgeship.llm.attention import additive_mask
from edgeship.llm.cache import FixedCache
from edgeship.llm.step import run

if TYPE_CHECKING:
    from edgeship.core.decoder import AttentionLayer

NAME = "edgeship_coreml"
# Below this a row's largest value no longer scales it: float16 would lose the epsilon of the norm otherwise.
LEAST_SCALE = 2.0**-10


@torch.library.custom_op("edgeship::write_rows", mutates_args=())
def write_rows(cache: torch.Tensor, rows: torch.Tensor, position: torch.Tensor, axis: int) -> torch.Tensor:
    """A cache with ``rows``, fewer along ``axis``, written from ``position`` ``[1]`` on."""
    written = cache.clone()
    written.narrow(axis, int(position), rows.shape[axis]).copy_(rows)
    return written


@write_rows.register_fake
def _(cache: torch.Tensor, rows: torch.Tensor, position: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.empty_like(cache)


def write_tokens(cache: torch.Tensor, rows: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """A cache ``[1, H, L, D]`` with the rows ``[1, H, T, D]`` of new tokens."""
    return cast("torch.Tensor", write_rows(cache, rows, position, 2))


def register() -> None:
    """Make ``attn_implementation="edgeship_coreml"`` known to transformers. Safe to call again."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.models.falcon import modeling_falcon

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, additive_mask)
    modeling_falcon.FALCON_ATTENTION_CLASSES[NAME] = modeling_falcon.FalconAttention


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention ``[1, heads, T, D]`` over ``[1, kv_heads, L, D]``, queries scaled first: large ones stay in float16."""
    heads, tokens, width = (int(size) for size in query.shape[1:])
    group = heads // int(key.shape[1])
    scaled = query * (width**-0.5 if scaling is None else scaling)
    rows = scaled.reshape(1, key.shape[1], group * tokens, width)
    scores = torch.matmul(rows, key.transpose(2, 3))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + (attention_mask if tokens == 1 else attention_mask.repeat(1, 1, group, 1))
    mixed = torch.matmul(torch.softmax(scores, dim=-1), value)
    return mixed.reshape(1, heads, tokens, value.shape[-1]).transpose(1, 2), None


class Tables(nn.Module):
    """A rotary module whose cosines and sines are looked up by position.

    Args:
        rotary: returns ``(cos, sin)`` from ``position_ids``, perhaps by type of layer.
        context: rows of the tables.

    Raises:
        LoweringError: the angles of a position depend on the length of the text.
    """

    def __init__(self, rotary: nn.Module, context: int) -> None:
        super().__init__()
        by_layer = "layer_type" in inspect.signature(rotary.forward).parameters
        self.kinds: Sequence[str | None] = list(rotary.rope_type) if by_layer else [None]  # type: ignore[arg-type]
        for kind in self.kinds:
            cos, sin = _angles(rotary, context, kind)
            few = _angles(rotary, max(context // 2, 1), kind)
            if not all(torch.equal(whole[: len(half)], half) for whole, half in zip((cos, sin), few, strict=True)):
                raise LoweringError(
                    f"{type(rotary).__name__} rotates by other angles in longer texts than {context // 2} tokens",
                    fix="give a --context that the model was first trained for",
                )
            self.register_buffer(f"cos_{kind}", cos)
            self.register_buffer(f"sin_{kind}", sin)

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(cos, sin)``, each ``[1, T, width]``."""
        rows = position_ids[0]
        cos, sin = getattr(self, f"cos_{layer_type}"), getattr(self, f"sin_{layer_type}")
        return cos.index_select(0, rows)[None], sin.index_select(0, rows)[None]


def _angles(rotary: nn.Module, count: int, kind: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1), torch.arange(count)[None], *([] if kind is None else [kind]))
    return cos[0], sin[0]


class ScaledNorm(nn.Module):
    """RMS norm that squares nothing larger than one: in float16, 256 squared is infinite.

    ``x / sqrt(mean(x^2) + eps) = y / sqrt(mean(y^2) + eps / m^2)`` with ``y = x / m`` and ``m = max |x|``.
    """

    def __init__(self, weight: nn.Parameter, epsilon: float, shifted: bool) -> None:
        super().__init__()
        self.weight, self.epsilon, self.shifted = weight, epsilon, shifted

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm over the last axis."""
        return scaled_norm(x, -1, self.epsilon) * (1.0 + self.weight if self.shifted else self.weight)


def scaled_norm(x: torch.Tensor, axis: int, epsilon: float) -> torch.Tensor:
    """``x`` over the root of its mean square along one axis, in numbers that float16 holds."""
    # A clamp would get an upper bound as well, which is infinite in float16.
    largest = torch.maximum(x.abs().amax(axis, keepdim=True), torch.full((), LEAST_SCALE, dtype=x.dtype))
    y = x / largest
    root = math.sqrt(epsilon) / largest
    return y * torch.rsqrt((y * y).mean(axis, keepdim=True) + root * root)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is an RMS norm as transformers writes it."""
    return type(module).__name__.endswith("RMSNorm") and epsilon_of(module) is not None


def epsilon_of(module: nn.Module) -> float | None:
    """What an RMS norm adds to the mean square."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def is_shifted(module: nn.Module) -> bool:
    """Whether it scales by one more than its weight, as Gemma's do."""
    return type(module).__name__.startswith("Gemma")


def prepare(model: nn.Module, context: int, half: bool) -> None:
    """Replace in place what Core ML needs otherwise: rotations, and norms when it computes in float16."""
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if type(module).__name__.endswith("RotaryEmbedding"):
            setattr(model.get_submodule(parent), leaf, Tables(module, context))
        elif half and is_norm(module):
            norm = ScaledNorm(module.weight, float(epsilon_of(module) or 0.0), is_shifted(module))  # type: ignore[arg-type]
            setattr(model.get_submodule(parent), leaf, norm)


class StatefulStep(nn.Module):
    """``(input_ids [1, T], position [1]) -> logits [1, T, vocabulary]``, keys and values kept in buffers.

    Buffers are ``k_cache_0 .. k_cache_n`` and ``v_cache_0 ..``, each ``[1, kv_heads, context, head_dim]``.

    Args:
        logits: False leaves the head out; the answer is then the next position, ``[1]``.
    """

    def __init__(self, model: nn.Module, layers: Sequence[AttentionLayer], context: int, *, logits: bool) -> None:
        super().__init__()
        self.model, self.count, self.logits = model, len(layers), logits
        for i, layer in enumerate(layers):
            for kind in ("k", "v"):
                self.register_buffer(
                    f"{kind}_cache_{i}", untouched_zeros(1, layer.kv_heads, context, layer.head_dim), persistent=True
                )

    def forward(self, input_ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Run ``T`` tokens from ``position`` on."""
        # [1, heads, context, width] of each layer
        keys = [getattr(self, f"k_cache_{i}") for i in range(self.count)]
        values = [getattr(self, f"v_cache_{i}") for i in range(self.count)]
        cache = FixedCache(keys, values, position, write_tokens)
        answer = run(self.model, input_ids, cache, logits=self.logits)
        for kind, written in (("k", cache.keys), ("v", cache.values)):
            for i, value in enumerate(written):
                getattr(self, f"{kind}_cache_{i}").copy_(value)
        return position + input_ids.shape[1] if answer is None else answer


def untouched_zeros(*shape: int) -> torch.Tensor:
    """Zeros whose pages the system gives only to who looks at them: caches of long contexts are large.

    ``shape`` is that of the cache: [1, heads, context, width].
    """
    import numpy as np

    return torch.from_numpy(np.zeros(shape, np.float32))
