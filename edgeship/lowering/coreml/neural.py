"""A decoder in the form that the Neural Engine likes: everything is ``(1, C, 1, T)``, every matrix a 1x1 convolution.

As Apple describes in "Deploying Transformers on the Apple Neural Engine" (2022): channels first, no transposes between
layers, keys and values ``[1, kv_heads, head_dim, L]`` so that both products of attention take them as they lie, heads
of a group in turn instead of repeated keys. The table of tokens is looked up, and large tables are cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import functional

from edgeship.errors import LoweringError
from edgeship.llm.attention import MASK
from edgeship.llm.probing import root_norm_of, rotation_kinds
from edgeship.lowering.coreml.parts import GENERIC
from edgeship.lowering.coreml.stateful import Tables, scaled_norm, untouched_zeros, write_rows

if TYPE_CHECKING:
    from edgeship.core.decoder import AttentionLayer
    from edgeship.lowering.coreml.parts import Parts

# Rows of a vocabulary in one convolution; the Neural Engine takes no more than this along an axis.
MAX_ROWS = 16384


@dataclass(frozen=True)
class Source:
    """Which rows of which of the model's parameters one parameter is."""

    parameter: torch.Tensor
    start: int = 0
    stop: int | None = None


class Matrix(nn.Module):
    """Rows of a linear layer as a 1x1 convolution; also the rows of a table that it shares its weight with."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, start: int = 0, stop: int | None = None
    ) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(weight[start:stop, :, None, None], requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias[start:stop], requires_grad=False)
        self.sources = {"weight": Source(weight, start, stop)}
        if bias is not None:
            self.sources["bias"] = Source(bias, start, stop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(1, C, 1, T)`` to ``(1, rows, 1, T)``."""
        return functional.conv2d(x, self.weight, self.bias)

    def look_up(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``[T]`` of the weight as ``(1, C, 1, T)``."""
        found = self.weight.index_select(0, rows)
        return found.permute(2, 1, 3, 0)


class Pieces(nn.Module):
    """A weight with many rows, in pieces of at most `MAX_ROWS`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        rows = weight.shape[0]
        self.pieces = nn.ModuleList(
            Matrix(weight, bias, start, min(start + MAX_ROWS, rows)) for start in range(0, rows, MAX_ROWS)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product with all rows."""
        parts = [piece(x) for piece in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def look_up(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of whichever piece has them, as ``(1, C, 1, T)``."""
        found: torch.Tensor | None = None
        for piece in cast("Sequence[Matrix]", self.pieces):
            inside = rows - piece.start
            part = piece.look_up(inside.clamp(0, piece.weight.shape[0] - 1))
            found = part if found is None else torch.where(inside >= 0, part, found)
        assert found is not None
        return found


class Norm(nn.Module):
    """An RMS norm over one axis of a tensor with four."""

    weight: torch.Tensor | None

    def __init__(self, norm: Any, axis: int) -> None:
        super().__init__()
        found = root_norm_of(norm)
        if found is None:
            raise LoweringError(f"{type(norm).__name__} is not an RMS norm as it is known", fix=GENERIC)
        self.axis, self.epsilon = axis, found.epsilon
        shape = [-1 if i == axis else 1 for i in range(4)]
        weight = norm.weight + found.offset if found.offset else getattr(norm, "weight", None)
        self.register_buffer("weight", None if weight is None else weight.detach().reshape(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        normed = scaled_norm(x, self.axis, self.epsilon)
        return normed if self.weight is None else normed * self.weight


def _norm(norm: nn.Module | None, axis: int = 1) -> nn.Module:
    return nn.Identity() if norm is None else Norm(norm, axis)


class Layer(nn.Module):
    """One layer, rebuilt from its parts."""

    def __init__(self, parts: Parts, sizes: AttentionLayer) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = sizes.heads, sizes.kv_heads, sizes.head_dim
        self.rotary, self.scaling, self.softcap = parts.rotary, parts.scaling, parts.softcap
        self.whole_norms, self.gated, self.activation = parts.whole_norms, parts.gated, parts.activation
        self.projections = nn.ModuleList(Matrix(linear.weight, linear.bias) for linear in parts.projections)
        self.out = Matrix(parts.out.weight, parts.out.bias)
        self.inner = nn.ModuleList(Matrix(linear.weight, linear.bias) for linear in parts.inner)
        self.down = Matrix(parts.down.weight, parts.down.bias)
        self.before_attention, self.after_attention = _norm(parts.before_attention), _norm(parts.after_attention)
        self.before_inner, self.after_inner = _norm(parts.before_inner), _norm(parts.after_inner)
        axis = 1 if parts.whole_norms else 2
        self.query_norm, self.key_norm = _norm(parts.query_norm, axis), _norm(parts.key_norm, axis)

    def forward(
        self, x: torch.Tensor, angles: Any, mask: torch.Tensor, position: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``x`` ``(1, C, 1, T)`` and the caches; all three again."""
        mixed, k, v = self._attention(self.before_attention(x), angles, mask, position, k, v)
        x = x + self.after_attention(self.out(mixed))
        return x + self.after_inner(self._inner(self.before_inner(x))), k, v

    def _attention(
        self, x: torch.Tensor, angles: Any, mask: torch.Tensor, position: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = x.shape[3]
        query, key, value = self._split(x)
        query = self._turned(self._normed(self.query_norm, query, self.heads), angles) * self.scaling
        key = self._turned(self._normed(self.key_norm, key, self.kv_heads), angles)
        k = write_rows(k, key, position, 3)
        v = write_rows(v, value.reshape(1, self.kv_heads, self.width, tokens), position, 3)
        group = self.heads // self.kv_heads
        if tokens == 1:
            # Heads of a group are rows of one product: nothing has to be moved for that.
            weights = self._weights(query.reshape(1, self.kv_heads, group, self.width) @ k, mask)
            mixed = weights @ v.transpose(2, 3)
        else:
            grouped = query.reshape(1, self.kv_heads, group * self.width, tokens)
            parts = []
            for head in range(group):
                rows = grouped[:, :, head * self.width : (head + 1) * self.width]
                weights = self._weights(rows.transpose(2, 3) @ k, mask)
                parts.append(v @ weights.transpose(2, 3))
            mixed = parts[0] if group == 1 else torch.cat(parts, dim=2)
        return mixed.reshape(1, self.heads * self.width, 1, tokens), k, v

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each ``(1, heads * width, 1, T)``."""
        made = [projection(x) for projection in self.projections]
        if len(made) == 3:
            return made[0], made[1], made[2]
        (fused,) = made
        first, second = self.heads * self.width, (self.heads + self.kv_heads) * self.width
        return fused[:, :first], fused[:, first:second], fused[:, second:]

    def _normed(self, norm: nn.Module, x: torch.Tensor, heads: int) -> torch.Tensor:
        if self.whole_norms:
            x = norm(x)
        x = x.reshape(1, heads, self.width, x.shape[3])
        return x if self.whole_norms else norm(x)

    def _turned(self, x: torch.Tensor, angles: Any) -> torch.Tensor:
        """``(1, heads, width, T)`` turned by the angle of each position; a part of the width where angles are fewer."""
        if self.rotary is None:
            return x
        cos, sin = angles[self.rotary or None]
        size = int(cos.shape[2])
        turned, rest = x[:, :, :size], x[:, :, size:]
        first, second = turned[:, :, : size // 2], turned[:, :, size // 2 :]
        turned = turned * cos + torch.cat([-second, first], dim=2) * sin
        return turned if size == self.width else torch.cat([turned, rest], dim=2)

    def _weights(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.softcap:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        return torch.softmax(scores + mask, dim=-1)

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        made = [part(x) for part in self.inner]
        if not self.gated:
            return self.down(self.activation(made[0]))  # type: ignore[no-any-return]
        gate, up = made if len(made) == 2 else made[0].chunk(2, dim=1)
        return self.down(self.activation(gate) * up)  # type: ignore[no-any-return]


class Angles(nn.Module):
    """Tables of cosines and sines, looked up by position into ``(1, 1, width, T)``, by type of layer."""

    def __init__(self, tables: Tables) -> None:
        super().__init__()
        self.kinds = tables.kinds
        for kind in self.kinds:
            for name in (f"cos_{kind}", f"sin_{kind}"):
                self.register_buffer(name, getattr(tables, name).T[None, None].contiguous())

    def forward(self, positions: torch.Tensor) -> dict[str | None, tuple[torch.Tensor, torch.Tensor]]:
        """``(cos, sin)`` by type of layer."""
        return {
            kind: (
                getattr(self, f"cos_{kind}").index_select(3, positions),
                getattr(self, f"sin_{kind}").index_select(3, positions),
            )
            for kind in self.kinds
        }


class NeuralStep(nn.Module):
    """Some layers of a decoder, or all.

    ``(input_ids [1, T] or hidden (1, C, 1, T), position [1])`` to hidden, logits, or the next position.

    Args:
        model: a transformers decoder. parts: of all its layers. sizes: of all its layers. context: of the caches.
        layers: which of them this step has. The first has the table of tokens, the last the norm and the head.
        logits: False leaves the head out.
    """

    def __init__(
        self, model: Any, parts: Sequence[Parts], sizes: Sequence[AttentionLayer], context: int, layers: range, *,
        logits: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        base = getattr(model, model.base_model_prefix)
        self.numbers, self.logits, self.context = layers, logits, context
        self.first, self.last = layers.start == 0, layers.stop == len(sizes)
        self.windows = [sizes[i].window for i in layers]
        self.layers = nn.ModuleList(Layer(parts[i], sizes[i]) for i in layers)
        rotary = next((module for module in base.modules() if rotation_kinds(module)), None)
        self.angles = None if rotary is None else Angles(Tables(rotary, context))
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = head.weight is embedding.weight
        if self.first:
            # One piece where it is not the head as well: only looking up takes a table of any length.
            table = embedding.weight
            self.table: nn.Module = Pieces(table) if tied else Matrix(table, None)
            self.scale = float(getattr(embedding, "scalar_embed_scale", 1.0))
        if self.last and logits:
            last = getattr(base, "norm", None)
            if last is None:
                raise LoweringError("layers are not rebuilt for the Neural Engine: no norm ends them", fix=GENERIC)
            self.norm = Norm(last, 1)
            shared = tied and self.first and head.bias is None
            self.head: nn.Module = self.table if shared else Pieces(head.weight, head.bias)
            self.softcap = float(getattr(model.config, "final_logit_softcapping", None) or 0.0)
        for i in layers:
            shape = (1, sizes[i].kv_heads, sizes[i].head_dim, context)
            for kind in ("k", "v"):
                self.register_buffer(f"{kind}_cache_{i}", untouched_zeros(*shape))

    def forward(self, given: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Run ``T`` tokens, or what the layers before made of them, from ``position`` on."""
        tokens = given.shape[-1]
        positions = torch.arange(tokens, dtype=torch.int32) + position
        x = given
        if self.first:
            x = self.table.look_up(given[0]) * self.scale  # type: ignore[operator]
        angles = {} if self.angles is None else self.angles(positions)
        keys = torch.arange(self.context, dtype=torch.int32)
        masks: dict[int | None, torch.Tensor] = {}
        for window in self.windows:
            if window not in masks:
                masks[window] = _mask(positions, keys, window)
        for i, layer in zip(self.numbers, self.layers, strict=True):
            k, v = getattr(self, f"k_cache_{i}"), getattr(self, f"v_cache_{i}")
            x, new_k, new_v = layer(x, angles, masks[self.windows[i - self.numbers.start]], position, k, v)
            k.copy_(new_k)
            v.copy_(new_v)
        if not self.last:
            return x
        if not self.logits:
            return position + tokens
        answer = self.head(self.norm(x))
        if self.softcap:
            answer = torch.tanh(answer / self.softcap) * self.softcap
        logits: torch.Tensor = answer.reshape(1, 1, -1)
        return logits

    def sources(self) -> dict[str, Source]:
        """Name of each parameter -> which rows of which of the model's it is."""
        return {
            f"{name}.{key}": source
            for name, module in self.named_modules(remove_duplicate=False)
            if isinstance(module, Matrix)
            for key, source in module.sources.items()
        }


def _mask(positions: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """``(1, 1, T, L)``: 0 where a token may look, -1e4 where not."""
    seen = keys[None, :] <= positions[:, None]
    if window is not None:
        seen = seen & (keys[None, :] > positions[:, None] - window)
    return torch.where(seen, 0.0, MASK)[None, None]
