"""OpenELM, a decoder whose layers differ in width, for transformers, which has no such model.

From the paper: S. Mehta et al., "OpenELM: An Efficient Language Model Family with Open Training and Inference
Framework", arXiv:2404.14619. Pre-norm RMSNorm without biases, rotary positions, grouped-query attention with normed
queries and keys, SwiGLU, one matrix for embedding and head. Parameter names are those of the published checkpoints, so
that one loads after :func:`register`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from edgeship.compat.openelm_config import OpenELMConfig


class OpenELMRMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last axis; the mean is taken in float32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape whose last axis is ``width``."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * scale).to(x.dtype) * self.weight


class OpenELMRotaryEmbedding(nn.Module):
    """Cosine and sine for each position, (batch, positions, head_dim); the two halves of a head are a pair."""

    inv_freq: torch.Tensor

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__()
        self.base, self.width = float(config.rope_freq_constant), config.head_dim
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    def frequencies(self) -> torch.Tensor:
        """Radians a position, for each pair."""
        return self.base ** -(torch.arange(0, self.width, 2, dtype=torch.float32) / self.width)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles of ``position_ids`` (batch, positions) in float32; the answer in the type of ``x``."""
        angles = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``x`` (batch, heads, positions, head_dim) turned by the angle of its position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, what transformers calls "eager": (batch, positions, heads, head_dim) and the weights."""
    groups = int(module.num_key_value_groups)  # type: ignore[arg-type]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class OpenELMAttention(nn.Module):
    """Grouped-query attention of one layer; ``qkv_proj`` gives the heads of queries, then of keys, then of values."""

    def __init__(self, config: OpenELMConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.num_query_heads is not None
        assert config.num_kv_heads is not None
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_heads, self.num_key_value_heads = config.num_query_heads[layer_idx], config.num_kv_heads[layer_idx]
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling, self.is_causal = config.head_dim**-0.5, True
        heads = self.num_heads + 2 * self.num_key_value_heads
        self.qkv_proj = nn.Linear(config.model_dim, heads * self.head_dim, bias=False)
        normed = config.normalize_qk_projections
        self.q_norm = OpenELMRMSNorm(self.head_dim) if normed else None
        self.k_norm = OpenELMRMSNorm(self.head_dim) if normed else None
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, config.model_dim, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, positions, width) in and out, and the attention weights where the interface gives them."""
        batch, length = hidden_states.shape[:2]
        heads = self.qkv_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        query, key, value = heads.split([self.num_heads, self.num_key_value_heads, self.num_key_value_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, plain_attention
        )
        mixed, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **others)
        return self.out_proj(mixed.reshape(batch, length, -1).contiguous()), weights


class OpenELMFeedForward(nn.Module):
    """``proj_2(act(gate) * up)`` with gate and up stacked in ``proj_1``, or ``proj_2(act(proj_1))`` without a gate."""

    def __init__(self, config: OpenELMConfig, layer_idx: int) -> None:
        super().__init__()
        inner = config.per_layer_config[layer_idx].intermediate_size
        self.gated = config.ffn_with_glu
        self.proj_1 = nn.Linear(config.model_dim, 2 * inner if self.gated else inner, bias=False)
        self.proj_2 = nn.Linear(inner, config.model_dim, bias=False)
        self.act = ACT2FN[config.activation_fn_name]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) in and out."""
        x = self.proj_1(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.proj_2(self.act(gate) * up)  # type: ignore[no-any-return]
        return self.proj_2(self.act(x))  # type: ignore[no-any-return]


class OpenELMDecoderLayer(nn.Module):
    """Attention and feed-forward, each after a norm and around a shortcut."""

    def __init__(self, config: OpenELMConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn = OpenELMAttention(config, layer_idx)
        self.ffn = OpenELMFeedForward(config, layer_idx)
        self.attn_norm = OpenELMRMSNorm(config.model_dim)
        self.ffn_norm = OpenELMRMSNorm(config.model_dim)

    def forward(self, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        """(batch, positions, width) in and out; the rest goes to the attention."""
        hidden_states = hidden_states + self.attn(self.attn_norm(hidden_states), **others)[0]
        return hidden_states + self.ffn(self.ffn_norm(hidden_states))  # type: ignore[no-any-return]


class OpenELMPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What transformers has to know to load and to run both models below."""

    config: OpenELMConfig
    config_class = OpenELMConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "token_embeddings"
    _no_split_modules: ClassVar[list[str]] = ["OpenELMDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": OpenELMDecoderLayer,
        "attentions": OpenELMAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # No checkpoint holds it, and a model that was made on the meta device has no numbers there.
        if isinstance(module, OpenELMRotaryEmbedding):
            initialization.copy_(module.inv_freq, module.frequencies())


class OpenELMModel(OpenELMPreTrainedModel):
    """Token ids, or embeddings, to the hidden states after the last norm."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim, config.pad_token_id)
        self.layers = nn.ModuleList(OpenELMDecoderLayer(config, i) for i in range(config.num_transformer_layers))
        self.norm = OpenELMRMSNorm(config.model_dim)
        self.rotary_emb = OpenELMRotaryEmbedding(config)
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """``input_ids`` or ``inputs_embeds``; positions go on from the cache where they are not given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("OpenELM takes either input_ids or inputs_embeds")
        x = self.token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        angles = self.rotary_emb(x, position_ids)
        for layer in self.layers:
            x = layer(
                x,
                attention_mask=mask,
                position_embeddings=angles,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **others,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class OpenELMForCausalLM(OpenELMPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Logits of the next token. A shared head is the embedding's own parameter, and is not in the checkpoint."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.token_embeddings.weight"}

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.transformer = OpenELMModel(config)
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """As every causal model of transformers; ``logits_to_keep`` cuts positions before the head."""
        out = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **others,
        )
        logits = self.lm_head(slice_logits_to_keep(out.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **others)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


def register() -> None:
    """Make transformers' ``Auto`` classes know the model type "openelm"; may be called again."""
    AutoConfig.register(OpenELMConfig.model_type, OpenELMConfig, exist_ok=True)
    AutoModel.register(OpenELMConfig, OpenELMModel, exist_ok=True)
    AutoModelForCausalLM.register(OpenELMConfig, OpenELMForCausalLM, exist_ok=True)
