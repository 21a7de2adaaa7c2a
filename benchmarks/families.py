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
OPENELM = {
    "model_dim": 64, "head_dim": 16, "num_transformer_layers": 3, "num_gqa_groups": 2,
    "qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 2.0], "ffn_dim_divisor": 32, "max_context_length": 128,
    "rope_max_length": 256,
}  # fmt: skip


def make_family(family: str, folder: Path) -> Path:
    """Write the folder. Weights are drawn wide enough that greedy tokens are far from ties."""
    import transformers

    from edgeship.llm import openelm

    name, extra = FAMILIES[family]
    torch.manual_seed(0)
    if family == "openelm":
        openelm.register()
        tokens = {key: COMMON[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
        model: Any = openelm.OpenELMForCausalLM(openelm.OpenELMConfig(**OPENELM, **tokens))
    else:
        config = getattr(transformers, name)(**{**COMMON, **extra})
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # A tied table with large rows makes every token its own likeliest successor.
                parameter.normal_(0, 0.05 if "embed" in parameter_name else 0.15)
            elif parameter_name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 256 tokens, one a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
