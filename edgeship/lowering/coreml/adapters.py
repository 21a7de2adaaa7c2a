"""Where each family keeps the parts of a layer, for the form that the Neural Engine likes.

An adapter is a function from a transformers layer to `Parts`. What it says is checked: `edgeship.lowering.coreml.check`
compares the layers rebuilt from the parts with the model itself before they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Parts:
    """One layer of a decoder, taken apart.

    ``x = x + after_attention(attention(before_attention(x)))``, then the same with the feed-forward; norms that a
    family lacks are None.

    Args:
        projections: linear layers whose outputs, one after the other, are queries, keys and values.
        out: linear layer after attention.
        query_norm, key_norm: RMS norms before rotation, over a head, or over all heads when ``whole_norms``.
        rotary: which table of angles; None where the layer does not rotate, "" where the model has one table.
        scaling: of scores. softcap: of scores, 0 for none.
        inner: linear layers whose outputs, one after the other, are gate and up; only up when not ``gated``.
        down: the linear layer after them. activation: of the gate, or of up.
    """

    projections: tuple[nn.Linear, ...]
    out: nn.Linear
    inner: tuple[nn.Linear, ...]
    down: nn.Linear
    activation: Callable[..., Any]
    before_attention: nn.Module | None = None
    after_attention: nn.Module | None = None
    before_inner: nn.Module | None = None
    after_inner: nn.Module | None = None
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None
    whole_norms: bool = False
    rotary: str | None = ""
    scaling: float = 1.0
    softcap: float = 0.0
    gated: bool = True


def llama(layer: Any) -> Parts:
    """Llama, Mistral, Qwen2: norms before each half."""
    attention, inner = layer.self_attn, layer.mlp
    return Parts(
        (attention.q_proj, attention.k_proj, attention.v_proj),
        attention.o_proj,
        (inner.gate_proj, inner.up_proj),
        inner.down_proj,
        inner.act_fn,
        before_attention=layer.input_layernorm,
        before_inner=layer.post_attention_layernorm,
        scaling=attention.scaling,
    )


def qwen3(layer: Any) -> Parts:
    """Norms of each head's queries and keys."""
    return replace(llama(layer), query_norm=layer.self_attn.q_norm, key_norm=layer.self_attn.k_norm)


def smollm3(layer: Any) -> Parts:
    """Some layers do not rotate."""
    return replace(llama(layer), rotary="" if layer.self_attn.use_rope else None)


def olmo2(layer: Any) -> Parts:
    """Norms after each half, and of all heads' queries and keys."""
    attention, inner = layer.self_attn, layer.mlp
    return Parts(
        (attention.q_proj, attention.k_proj, attention.v_proj),
        attention.o_proj,
        (inner.gate_proj, inner.up_proj),
        inner.down_proj,
        inner.act_fn,
        after_attention=layer.post_attention_layernorm,
        after_inner=layer.post_feedforward_layernorm,
        query_norm=attention.q_norm,
        key_norm=attention.k_norm,
        whole_norms=True,
        scaling=attention.scaling,
    )


def gemma2(layer: Any) -> Parts:
    """Norms around each half, capped scores."""
    return replace(
        llama(layer),
        after_attention=layer.post_attention_layernorm,
        before_inner=layer.pre_feedforward_layernorm,
        after_inner=layer.post_feedforward_layernorm,
        softcap=layer.self_attn.attn_logit_softcapping or 0.0,
    )


def gemma3(layer: Any) -> Parts:
    """Gemma 2 with norms of heads, and angles by type of layer."""
    attention = layer.self_attn
    return replace(gemma2(layer), query_norm=attention.q_norm, key_norm=attention.k_norm, rotary=attention.layer_type)


def phi3(layer: Any) -> Parts:
    """Fused projections."""
    attention, inner = layer.self_attn, layer.mlp
    return Parts(
        (attention.qkv_proj,),
        attention.o_proj,
        (inner.gate_up_proj,),
        inner.down_proj,
        inner.activation_fn,
        before_attention=layer.input_layernorm,
        before_inner=layer.post_attention_layernorm,
        scaling=attention.scaling,
    )


def openelm(layer: Any) -> Parts:
    """Fused projections, norms of heads, layers of different widths."""
    attention, inner = layer.attn, layer.ffn
    return Parts(
        (attention.qkv_proj,),
        attention.out_proj,
        (inner.proj_1,),
        inner.proj_2,
        inner.act,
        before_attention=layer.attn_norm,
        before_inner=layer.ffn_norm,
        query_norm=attention.q_norm,
        key_norm=attention.k_norm,
        scaling=attention.scaling,
        gated=inner.gated,
    )


ADAPTERS: Mapping[str, Callable[[Any], Parts]] = {
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "qwen3": qwen3,
    "smollm3": smollm3,
    "olmo2": olmo2,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "phi3": phi3,
    "openelm": openelm,
}
