"""OpenELM's configuration: the widths of its layers, from two factors or from lists.

Layer ``i`` has ``alpha_i * width / head_dim`` query heads and an inner width of ``beta_i * width``; both factors grow
linearly from the first layer to the last (Mehta et al., arXiv:2404.14619, section 2.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from edgeship.errors import SourceError

# What the four published sizes differ in; everything else is the configuration's default.
PUBLISHED: dict[str, dict[str, int]] = {
    "270M": {"model_dim": 1280, "num_transformer_layers": 16, "head_dim": 64},
    "450M": {"model_dim": 1536, "num_transformer_layers": 20, "head_dim": 64},
    "1.1B": {"model_dim": 2048, "num_transformer_layers": 28, "head_dim": 64},
    "3B": {"model_dim": 3072, "num_transformer_layers": 36, "head_dim": 128},
}


class OpenELMConfig(PreTrainedConfig):  # type: ignore[misc]
    """The published ``config.json``. The defaults are the 1.1B model.

    A multiplier is one number for all layers, a pair (first layer, last layer), or one number a layer.
    ``num_query_heads`` and ``num_kv_heads``, one number a layer, follow from the multipliers where the file has none.
    ``per_layer_config[i]`` tells transformers' caches the heads and the inner width of layer ``i``.

    Raises:
        SourceError: a list of another length than the layers, heads that do not divide, an unknown norm or activation.
    """

    model_type = "openelm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
        "max_position_embeddings": "max_context_length",
        "hidden_act": "activation_fn_name",
        "tie_word_embeddings": "share_input_output_layers",
    }

    vocab_size: int = 32000
    max_context_length: int = 2048
    num_transformer_layers: int = 28
    model_dim: int = 2048
    head_dim: int = 64
    qkv_multipliers: float | Sequence[float] = (0.5, 1.0)
    num_gqa_groups: int = 4
    num_query_heads: Sequence[int] | None = None
    num_kv_heads: Sequence[int] | None = None
    ffn_multipliers: float | Sequence[float] = (0.5, 4.0)
    ffn_with_glu: bool = True
    ffn_dim_divisor: int = 256
    activation_fn_name: str = "swish"
    normalization_layer_name: str = "rms_norm"
    normalize_qk_projections: bool = True
    share_input_output_layers: bool = True
    rope_freq_constant: float = 10000
    # The length of the table that the original implementation starts with; angles are computed here, for any position.
    rope_max_length: int = 4096
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self, **others: Any) -> None:
        if self.normalization_layer_name != "rms_norm":
            raise SourceError(f"OpenELM with the norm {self.normalization_layer_name!r}; only rms_norm is known")
        if self.activation_fn_name not in ACT2FN:
            raise SourceError(f"OpenELM with the activation {self.activation_fn_name!r}, which transformers has not")
        unit = self.head_dim * self.num_gqa_groups
        if self.num_query_heads is None:
            factors = spread(self.qkv_multipliers, self.num_transformer_layers, "qkv_multipliers")
            widths = [nearest_multiple(factor * self.model_dim, unit) for factor in factors]
            self.num_query_heads = [width // self.head_dim for width in widths]
        if self.num_kv_heads is None:
            self.num_kv_heads = [heads // self.num_gqa_groups for heads in self.num_query_heads]
        self.ffn_multipliers = spread(self.ffn_multipliers, self.num_transformer_layers, "ffn_multipliers")
        for name in ("num_query_heads", "num_kv_heads"):
            if len(getattr(self, name)) != self.num_transformer_layers:
                raise SourceError(
                    f"OpenELM's {name} has not one number for each of {self.num_transformer_layers} layers"
                )
        if any(q % kv for q, kv in zip(self.num_query_heads, self.num_kv_heads, strict=True)):
            raise SourceError("OpenELM's num_query_heads is in some layer not a multiple of num_kv_heads")
        # Derived from the lists in any file; what an earlier save may have written is not read back.
        others["per_layer_config"] = {
            index: {
                "num_attention_heads": self.num_query_heads[index],
                "num_key_value_heads": self.num_kv_heads[index],
                "intermediate_size": nearest_multiple(factor * self.model_dim, self.ffn_dim_divisor),
            }
            for index, factor in enumerate(self.ffn_multipliers)
        }
        super().__post_init__(**others)

    def to_dict(self) -> dict[str, Any]:
        """As published: without ``per_layer_config``, which follows from the lists."""
        return _without_derived(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved; without ``per_layer_config`` as well."""
        return _without_derived(super().to_diff_dict())


def _without_derived(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "per_layer_config"}


def spread(factors: float | Sequence[float], layers: int, name: str) -> list[float]:
    """One factor a layer; a pair is the first and the last of a line, rounded to two places as the published files are.

    Raises:
        SourceError: a list with neither two numbers nor one a layer.
    """
    if isinstance(factors, int | float):
        return [float(factors)] * layers
    if len(factors) == layers:
        return [float(factor) for factor in factors]
    if len(factors) != 2:
        raise SourceError(f"OpenELM's {name} has {len(factors)} numbers for {layers} layers")
    first, last = factors
    return [round(first + (last - first) * index / max(layers - 1, 1), 2) for index in range(layers)]


def nearest_multiple(value: float, unit: int) -> int:
    """The multiple of ``unit`` nearest to ``value``, at least one, and never more than a tenth under it."""
    multiple = max(int(value / unit + 0.5), 1)
    return (multiple + 1 if multiple * unit < 0.9 * value else multiple) * unit
