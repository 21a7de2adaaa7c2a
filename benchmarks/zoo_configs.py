"""Small configurations of whatever transformers names: sizes are cut by the names and values of their fields."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

VOCABULARY = 256
# Of a field of this name, in any configuration that has it with a value of its own.
SMALL: Mapping[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "n_embd": 64, "n_head": 4, "n_heads": 4, "num_heads": 4, "n_inner": 96, "ffn_dim": 96, "d_model": 64, "d_ff": 96,
    "attention_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96, "d_kv": 16, "d_head": 16, "d_inner": 96, "dff": 96, "dim_ff": 96, "dim_head": 16,
    "max_position_embeddings": 160, "n_positions": 160, "n_ctx": 128, "max_seq_len": 128, "seq_length": 128,
    "context_length": 128, "max_source_positions": 64, "max_target_positions": 128, "model_max_length": 128,
    "sliding_window": 12, "sliding_window_size": 12, "window_size": 12, "attention_window_size": 12, "rotary_dim": 8,
    "attention_chunk_size": 12, "original_max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0, "embedding_size": 64, "word_embed_proj_dim": 64, "emb_dim": 64, "embedding_dim": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "moe_top_k": 2, "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48, "shared_experts_intermediate_size": 48, "expert_ffn_hidden_size": 48,
    "shared_intermediate_size": 48, "moe_shared_expert_intermediate_size": 48, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "zero_expert_num": 2, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_head_dim": 24, "mamba_n_heads": 8,
    "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_ngroups": 1,
    "mamba_d_ssm": 128, "mamba_chunk_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_headdim": 16,
    "mamba_dt_rank": 8, "ssm_state_size": 8, "time_step_rank": 8, "chunk_size": 8, "state_size": 8, "lru_width": 64,
    "num_memory_blocks": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_num_heads": 4, "linear_head_dim": 16, "hidden_size_per_layer_input": 8,
    "global_head_dim": 24, "num_kv_shared_layers": 0, "laurel_rank": 8, "query_pre_attn_scalar": 24,
    "intermediate_size_mlp": 96, "logits_scaling": 2.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5,
    "embedding_multiplier": 3.0, "index_n_heads": 8, "index_head_dim": 16, "index_topk": 8, "index_block_size": 4,
    "full_attention_interval": 2, "num_nextn_predict_layers": 0, "initializer_range": 0.1, "swa_head_dim": 16,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "attention_hidden_size": 64, "attention_head_dim": 16,
    "attention_head_size": 16, "feed_forward_size": 96, "num_kv_heads": 2, "num_query_groups": 2, "kv_channels": 16,
    "ffn_hidden_size": 96, "dense_intermediate_size": 96, "image_size": 64, "num_mel_bins": 16,
    "num_codebooks": 2, "router_hidden_size": 16, "adapter_rank": 4, "input_embedding_size": 64,
    "output_embedding_size": 64, "decoder_hidden_size": 64, "decoder_intermediate_size": 96,
    "d_state": 8, "o_lora_rank": 16, "prompt_length": 4, "num_queries": 10, "two_stage_num_proposals": 10,
    "num_frames": 4, "frames_per_clip": 4, "crop_size": 64, "num_latents": 16, "d_latents": 64,
    "num_self_attends_per_block": 2,
}  # fmt: skip
# The same where the default is None, and a model of that default does not run.
UNSAID = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts")
LAYERS = re.compile(
    r"^(num_|n_)?((hidden|encoder|decoder|dec|enc|transformer)_)?(layers?|blocks|block)$|^num_.*_layers$"
)
VOCABULARIES = re.compile(r"vocab_size|^vocab$|^vocabulary$")
WIDTHS = re.compile(r"(dim|hidden|width|channels|units|embed|size)")
# A backbone whose default is one of timm's, as transformers writes the same network itself.
BACKBONE: Mapping[str, Any] = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
# Settings that none of the names above fits, by what the model refuses without them.
OWN: Mapping[str, Mapping[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "falcon": {"alibi": False, "multi_query": True, "new_decoder_architecture": False},
    "deepseek_v2": {"topk_method": "greedy", "num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4, "n_group": 2},
    "qwen3_5_text": {"layer_types": ["full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "esmc": {"num_key_value_heads": 4},
    "bit": {"num_groups": 4},
    "efficientnet": {
        "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "num_block_repeats": [1] * 7,
    },
    "depth_pro": {"patch_size": 64, "intermediate_hook_ids": [1, 0]},
    # Its blocks take the rate of the stage that they are in, by its number.
    "cvt": {"depth": [1, 2, 3]},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "hgnet_v2": {
        "stem_channels": [3, 16, 16], "stage_in_channels": [16, 16, 32, 64], "stage_mid_channels": [16] * 4,
        "stage_out_channels": [16, 32, 64, 96], "stage_num_blocks": [1] * 4, "stage_numb_of_layers": [2] * 4,
    },
    "rt_detr": {"encoder_in_channels": [64, 96, 128]},
    "rt_detr_v2": {"encoder_in_channels": [64, 96, 128]},
    "sapiens2": {
        "num_key_value_heads_per_layer": [4, 2], "num_key_value_attention_heads": 2,
        "num_first_full_attention_layers": 1, "num_last_full_attention_layers": 0,
    },
    "videoprism_vision_model": {"image_size": 72},
    "xmod": {"default_language": "en_XX"},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "dots3_note_text": {"num_key_value_heads": 4},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"]},
    "zamba2": {"mamba_ngroups": 1, "n_mamba_heads": 8, "num_hidden_layers": 2, "hybrid_layer_ids": [1], "layer_types": ["mamba", "hybrid"]},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
        "intermediate_size": 96, "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "gemma4_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
}  # fmt: skip
# Other settings of a family that another of its models has.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "falcon+alibi": ("falcon", {"alibi": True}),
    "falcon+new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "qwen3_5_text+linear": ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention"]}),
    "deepseek_v2+lite": ("deepseek_v2", {"q_lora_rank": None}),
    "gemma4_text+equal_kv": ("gemma4_text", {"attention_k_eq_v": True, "num_kv_shared_layers": 0}),
}  # fmt: skip


def small_configuration(family: str, layers: int = 2, *, decoder: bool = False) -> Any:
    """A configuration of a model type, or of a variant, in which whatever is a size is small.

    Args:
        decoder: to write text, where the same type serves for both.
    """
    import transformers

    kind, extra = VARIANTS.get(family, (family, {}))
    config = shrunk(transformers.CONFIG_MAPPING[kind], layers, extra)
    if decoder and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    return config


def shrunk(cls: Any, layers: int = 2, own: Mapping[str, Any] | None = None, default: Any = None) -> Any:
    """A configuration of a class. Fields that hold another configuration are shrunk alike.

    Args:
        own: settings that count before all rules. default: what the fields are without them.
    """
    default = cls() if default is None else default
    fields = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    if "depths" in fields:
        # Sums over the stages, which a configuration makes itself.
        fields = {name: value for name, value in fields.items() if name not in ("num_layers", "hidden_size")}
    wanted: dict[str, Any] = _staged(fields)
    layers = max(layers, len(_ends(default, fields)))
    deep = _layers_of(fields)
    for name, value in fields.items():
        if name in wanted or name in cls.attribute_map or name in ("transformers_version", "model_type", "dtype"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            if value.model_type == "timm_backbone":
                wanted[name] = dict(BACKBONE)
                continue
            inner = shrunk(type(value), layers, default=value)
            wanted[name] = inner.to_dict() if isinstance(inner, object) else inner
            continue
        small = _small(name, value, layers, deep)
        if small is not None and small != value:
            wanted[name] = small
    if "qk_rope_head_dim" in fields and "head_dim" in wanted:
        # Latent attention: what its rotations are made for.
        wanted["head_dim"] = SMALL["qk_rope_head_dim"]
    if ends := _ends(default, fields):
        wanted |= {"out_indices": list(range(1, len(ends) + 1)), "out_features": None}
    if "kv_lora_rank" in fields and "num_key_value_heads" in wanted:
        wanted["num_key_value_heads"] = SMALL["num_attention_heads"]
    return cls(**{**_kept(default, wanted, cls), **OWN.get(cls.model_type, {}), **(own or {})})


def _staged(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a network of stages (``depths``) is told: as many stages as before, each short and narrow."""
    found: dict[str, Any] = {}
    for name in ("depths", "depth"):
        value = fields.get(name)
        if isinstance(value, list | tuple) and all(isinstance(depth, int) for depth in value):
            found[name] = [min(int(depth), 1 if place else 2) for place, depth in enumerate(value)]
    if not found:
        return {}
    heads = fields.get("num_heads")
    if isinstance(heads, list | tuple):
        found["num_heads"] = list(heads)
        if isinstance(fields.get("embed_dim"), int):
            found["embed_dim"] = 16 * heads[0]
    if isinstance(fields.get("window_size"), int):
        found["window_size"] = 4
    return found


def _ends(default: Any, fields: Mapping[str, Any]) -> list[int]:
    """The layers whose outputs a backbone gives, where it is one of equal layers and gives several."""
    ends = getattr(default, "out_indices", None)
    several = isinstance(ends, list | tuple) and len(ends) > 1 and "depths" not in fields
    return list(ends) if several and _layers_of(fields) else []


def _kept(default: Any, wanted: Mapping[str, Any], cls: Any) -> dict[str, Any]:
    """What differs from the class's own defaults, with what is wanted over it."""
    try:
        plain = cls().to_dict()
    except Exception:  # a class without defaults
        plain = {}
    told = {
        name: copy.deepcopy(value)
        for name, value in default.to_dict().items()
        if name not in ("transformers_version", "model_type", "dtype") and name in plain and plain[name] != value
    }
    return {**told, **wanted}


def _layers_of(fields: Mapping[str, Any]) -> set[int]:
    """How many layers the default has, by any of the names for it: what lists of that length are about."""
    found = {value for name, value in fields.items() if LAYERS.search(name) and isinstance(value, int)}
    return {value for value in found if value > 1}


def _small(name: str, value: Any, layers: int, deep: set[int]) -> Any:
    """The small value of a field; None where it stays."""
    if value is None:
        return SMALL[name] if name in UNSAID else None
    if isinstance(value, bool):
        return None
    if isinstance(value, list | tuple):
        return _small_list(name, list(value), layers, deep)
    if name in SMALL:
        return SMALL[name]
    if isinstance(value, float):
        return 0.0 if "drop" in name else None
    if not isinstance(value, int):
        return None
    if name == "patch_size":
        return min(value, 8)
    if VOCABULARIES.search(name):
        return VOCABULARY if value > VOCABULARY else None
    if name.endswith(("_token_id", "_token_index")):
        return 0 if value >= VOCABULARY else None
    if LAYERS.search(name):
        return min(value, layers)
    if value > 64 and WIDTHS.search(name):
        return 64
    return None


def _small_list(name: str, value: list[Any], layers: int, deep: set[int]) -> Any:
    """Lists about every layer are cut to as many, each kind of entry among them."""
    if name.endswith("_token_id"):
        return [1]
    if name == "image_size":
        return [SMALL[name]] * len(value)
    if len(value) in deep:
        kinds = list(dict.fromkeys(map(str, value)))
        first = [next(entry for entry in value if str(entry) == kind) for kind in kinds]
        return [first[i % len(first)] for i in range(layers)]
    if value and all(isinstance(entry, int) and entry > 64 for entry in value) and WIDTHS.search(name):
        steps = sorted(set(value))
        return [32 * (1 + steps.index(entry)) for entry in value] if len(steps) > 1 else [64] * len(value)
    return None
