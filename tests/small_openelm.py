"""The configuration of a small OpenELM."""

# 4 layers with 2, 4, 4 and 4 query heads over 1, 2, 2 and 2 key heads, and four inner widths.
SMALL = {
    "vocab_size": 97,
    "model_dim": 64,
    "head_dim": 16,
    "num_transformer_layers": 4,
    "num_gqa_groups": 2,
    "ffn_multipliers": (0.5, 3.5),
    "ffn_dim_divisor": 16,
    "max_context_length": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
}
