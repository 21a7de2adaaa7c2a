"""A small random model of every family of decoders, as a Hugging Face folder with a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 256
WINDOW = 12
COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
# Family -> (class of its configuration, what it sets beyond `COMMON`).
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "gemma2": ("Gemma2Config", {"tie_word_embeddings": False, "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3TextConfig", {"tie_word_embeddings": False, "head_dim": 16, "sliding_window": WINDOW, "sliding_window_pattern": 3}),
    "phi3": ("Phi3Config", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 3}),
    "olmo2": ("Olmo2Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}),
    "falcon": ("FalconConfig", {"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True, "bias": False, "alibi": False}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 96}),
    "openelm": ("OpenELMConfig", {}),
}  # fmt: skip
_STACKS: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 3, "forced_eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
# Encoder-decoders: name -> (class of the model, class of its configuration, what that sets).
ENCODER_DECODERS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", {
        "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 3,
        "num_heads": 4, "pad_token_id": 0, "decoder_start_token_id": 3, "tie_word_embeddings": False, "n_positions": 64,
    }),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {
        **_STACKS, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64,
    }),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**_STACKS, "max_position_embeddings": 64}),
}  # fmt: skip
OPENELM = {
    "model_dim": 64, "head_dim": 16, "num_transformer_layers": 3, "num_gqa_groups": 2,
    "qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 2.0], "ffn_dim_divisor": 32, "max_context_length": 128,
    "rope_max_length": 256,
}  # fmt: skip


def make_family(family: str, folder: Path) -> Path:
    """Write the folder. Weights are drawn wide enough that greedy tokens are far from ties."""
    import transformers

    from edgeship.compat import openelm

    name, extra = FAMILIES[family]
    torch.manual_seed(0)
    if family == "openelm":
        openelm.register()
        tokens = {key: COMMON[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
        model: Any = openelm.OpenELMForCausalLM(openelm.OpenELMConfig(**OPENELM, **tokens))
    else:
        config = getattr(transformers, name)(**{**COMMON, **extra})
        model = transformers.AutoModelForCausalLM.from_config(config)
    _draw(model)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_encoder_decoder(name: str, folder: Path) -> Path:
    """Write the folder of a small random encoder-decoder."""
    import transformers

    cls, config, values = ENCODER_DECODERS[name]
    torch.manual_seed(0)
    model: Any = getattr(transformers, cls)(getattr(transformers, config)(**values))
    # So that what is written changes with what is read and where it stands.
    _draw(model, *((0.05, 0.3, 0.3) if name == "t5" else (1.0, 0.05, 0.5)))
    model.save_pretrained(folder)
    return folder


def _draw(model: Any, table: float = 0.05, layer: float = 0.15, attention: float = 0.15) -> None:
    """Draw weights with these standard deviations."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # A tied table with large rows makes every token its own likeliest successor.
                embeds = "embed" in name or "shared" in name
                parameter.normal_(0, table if embeds else attention if "attn" in name else layer)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.generation_config.eos_token_id = None


def make_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 256 tokens, one a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
