"""A transformers decoder as a module with a memory: its caches are buffers, which become Core ML's states.

What float16 cannot do is written otherwise here: angles of rotations come from tables, queries are scaled before they
are multiplied, and norms divide by the largest value before they square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from edgeship.core.decoder import LEAST_CONTEXT
from edgeship.errors import LoweringError, UnsupportedOpError
from edgeship.llm.attention import Engine, Form, computed_by
from edgeship.llm.probing import angles_of, root_norm_of, rotation_kinds
from edgeship.llm.step import fixed_cache, refuse_states, run

if TYPE_CHECKING:
    from edgeship.core.decoder import Decoder
    from edgeship.llm.probing import RootNorm

# Queries are scaled first: large ones stay in float16.
FORM = Form(scaled="queries", one_row=True)
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


def _is_steady(rotary: nn.Module, context: int, kind: str | None) -> bool:
    """Whether the angles of a position are the same in texts of half the length."""
    whole = angles_of(rotary, torch.arange(context), kind)
    half = angles_of(rotary, torch.arange(max(context // 2, 1)), kind)
    return all(torch.equal(one[: len(other)], other) for one, other in zip(whole, half, strict=True))


def _longest_steady(rotary: nn.Module, context: int, kind: str | None) -> int:
    """The longest context below one that is not steady which is; 0 where none is found. Halving finds the end of what a
    model was first trained for, up to which all are."""
    low, high = 0, context
    while high - low > 1:
        middle = (low + high) // 2
        if middle < LEAST_CONTEXT or _is_steady(rotary, middle, kind):
            low = middle
        else:
            high = middle
    return low if low >= LEAST_CONTEXT else 0


class Tables(nn.Module):
    """A rotary module whose cosines and sines are looked up by position.

    Args:
        rotary: returns ``(cos, sin)`` from ``position_ids``, perhaps by type of layer; see `rotation_kinds`.
        context: rows of the tables.

    Raises:
        LoweringError: the angles of a position depend on the length of the text.
    """

    def __init__(self, rotary: nn.Module, context: int) -> None:
        super().__init__()
        self.kinds: Sequence[str | None] = rotation_kinds(rotary)
        for kind in self.kinds:
            cos, sin = angles_of(rotary, torch.arange(context), kind)
            if not _is_steady(rotary, context, kind):
                longest = _longest_steady(rotary, context, kind)
                raise LoweringError(
                    f"{type(rotary).__name__} rotates by other angles in longer texts",
                    fix=f"--context {longest} has the same ones throughout" if longest else "name other runtimes",
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


class ScaledNorm(nn.Module):
    """RMS norm that squares nothing larger than one: in float16, 256 squared is infinite.

    ``x / sqrt(mean(x^2) + eps) = y / sqrt(mean(y^2) + eps / m^2)`` with ``y = x / m`` and ``m = max |x|``.
    """

    def __init__(self, weight: nn.Parameter | None, norm: RootNorm) -> None:
        super().__init__()
        self.weight, self.norm = weight, norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm over the last axis."""
        normed = scaled_norm(x, -1, self.norm.epsilon)
        if self.weight is None:
            return normed
        return normed * (self.norm.offset + self.weight if self.norm.offset else self.weight)


def scaled_norm(x: torch.Tensor, axis: int, epsilon: float) -> torch.Tensor:
    """``x`` over the root of its mean square along one axis, in numbers that float16 holds."""
    # A clamp would get an upper bound as well, which is infinite in float16.
    largest = torch.maximum(x.abs().amax(axis, keepdim=True), torch.full((), LEAST_SCALE, dtype=x.dtype))
    y = x / largest
    root = math.sqrt(epsilon) / largest
    return y * torch.rsqrt((y * y).mean(axis, keepdim=True) + root * root)


def prepare(model: nn.Module, context: int, half: bool) -> None:
    """Replace in place what Core ML needs otherwise: rotations, and norms when it computes in float16."""
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if rotation_kinds(module):
            setattr(model.get_submodule(parent), leaf, Tables(module, context))
            continue
        norm = root_norm_of(module) if half else None
        if norm is not None:
            made = ScaledNorm(cast("nn.Parameter | None", getattr(module, "weight", None)), norm)
            setattr(model.get_submodule(parent), leaf, made)


class StatefulStep(nn.Module):
    """``(input_ids [1, T], position [1]) -> logits [1, T, vocabulary]``, keys and values kept in buffers.

    Buffers are ``k_cache_0 .. k_cache_n`` and ``v_cache_0 ..``, each ``[1, kv_heads, context, head_dim]``.

    Args:
        logits: False leaves the head out; the answer is then the next position, ``[1]``.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, context: int, *, logits: bool) -> None:
        super().__init__()
        refuse_states(decoder, "a Core ML or Core AI step")
        if decoder.fixed:
            raise UnsupportedOpError(f"states have a fixed length: {decoder.fixed}", fix="leave this runtime out")
        self.model, self.decoder, self.logits = model, decoder, logits
        for i, layer in enumerate(decoder.layers):
            for kind in ("k", "v"):
                self.register_buffer(
                    f"{kind}_cache_{i}", untouched_zeros(1, layer.kv_heads, context, layer.head_dim), persistent=True
                )

    def forward(self, input_ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Run ``T`` tokens from ``position`` on."""
        count = len(self.decoder.layers)
        # [1, heads, context, width] of each layer
        keys = [getattr(self, f"k_cache_{i}") for i in range(count)]
        values = [getattr(self, f"v_cache_{i}") for i in range(count)]
        cache = fixed_cache(self.decoder, keys, values, position, write_tokens)
        with computed_by(Engine(self.decoder.calls, FORM)):
            answer = run(self.model, input_ids, cache, position, logits=self.logits)
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
