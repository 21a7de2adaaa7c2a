from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from small_openelm import SMALL

from edgeship.compat.openelm import OpenELMForCausalLM, register
from edgeship.compat.openelm_config import PUBLISHED, OpenELMConfig


def small(**others: object) -> OpenELMForCausalLM:
    torch.manual_seed(0)
    model = OpenELMForCausalLM(OpenELMConfig(**{**SMALL, "initializer_range": 0.3, **others}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


# The lists of heads are those of the published config.json files.
@pytest.mark.parametrize(
    ("size", "parameters", "kv_heads"),
    [
        ("270M", 271_527_168, [3] * 5 + [4] * 7 + [5] * 4),
        ("450M", 457_179_136, [3] * 3 + [4] * 7 + [5] * 6 + [6] * 4),
        ("1.1B", 1_079_891_456, [4] * 3 + [5] * 7 + [6] * 8 + [7] * 6 + [8] * 4),
        ("3B", 3_036_647_424, [3] * 4 + [4] * 14 + [5] * 12 + [6] * 6),
    ],
)
def test_published_sizes(size: str, parameters: int, kv_heads: list[int]) -> None:
    config = OpenELMConfig(**PUBLISHED[size])
    with torch.device("meta"):
        model = OpenELMForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.num_kv_heads == kv_heads
    assert config.num_query_heads == [4 * heads for heads in kv_heads]
    assert [layer.attn.num_key_value_heads for layer in model.transformer.layers] == kv_heads


def test_layers_differ_and_names_are_the_published_ones() -> None:
    shapes = {name: tuple(value.shape) for name, value in small().state_dict().items()}
    expected = {
        "transformer.token_embeddings.weight": (97, 64),
        "transformer.norm.weight": (64,),
        "lm_head.weight": (97, 64),
    }
    for layer, (heads, inner) in enumerate([(2, 32), (4, 96), (4, 160), (4, 224)]):
        prefix = f"transformer.layers.{layer}."
        expected |= {
            f"{prefix}attn.qkv_proj.weight": (2 * heads * 16, 64),
            f"{prefix}attn.q_norm.weight": (16,),
            f"{prefix}attn.k_norm.weight": (16,),
            f"{prefix}attn.out_proj.weight": (64, heads * 16),
            f"{prefix}ffn.proj_1.weight": (2 * inner, 64),
            f"{prefix}ffn.proj_2.weight": (64, inner),
            f"{prefix}attn_norm.weight": (64,),
            f"{prefix}ffn_norm.weight": (64,),
        }
    assert shapes == expected


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_greedy_with_a_cache_is_greedy_without(attention: str) -> None:
    model = small(attn_implementation=attention)
    prompt = torch.tensor([[1, 5, 9, 33, 2]])
    tokens = prompt
    for _ in range(24):
        logits = model(input_ids=tokens, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    found = model.generate(prompt, max_new_tokens=24, do_sample=False)
    assert found.tolist() == tokens.tolist()
    assert len(set(tokens[0].tolist())) > 8, "a constant answer would prove nothing"
    static = model.generate(prompt, max_new_tokens=24, do_sample=False, cache_implementation="static")
    assert static.tolist() == tokens.tolist()


def test_the_cache_holds_each_layers_own_heads() -> None:
    model, cache = small(), DynamicCache()
    tokens = torch.arange(1, 9)[None]
    whole = model(input_ids=tokens, use_cache=False).logits
    first = model(input_ids=tokens[:, :5], past_key_values=cache, use_cache=True).logits
    second = model(input_ids=tokens[:, 5:], past_key_values=cache, use_cache=True).logits
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(1, heads, 8, 16) for heads in (1, 2, 2, 2)]
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-5)


def test_left_padding_does_not_change_the_answer() -> None:
    model = small()
    tokens = torch.tensor([[7, 8, 9, 10]])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3]])
    found = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(found, model(input_ids=tokens).logits, atol=1e-5, rtol=1e-5)


def test_one_layer_by_hand() -> None:
    """A layer of two query heads over one key head, against sums written out position by position."""
    model = small(num_transformer_layers=1, ffn_multipliers=1.0, qkv_multipliers=0.5, share_input_output_layers=False)
    values = {name: value.double() for name, value in model.state_dict().items()}
    layer = {name.removeprefix("transformer.layers.0."): value for name, value in values.items()}
    tokens = [3, 11, 42]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean() + 1e-6).sqrt() * weight

    def turn(x: torch.Tensor, position: int) -> torch.Tensor:
        out = torch.empty_like(x)
        for pair in range(8):
            angle = torch.tensor(position * 10000.0 ** (-2 * pair / 16), dtype=torch.float64)
            a, b = x[pair], x[pair + 8]
            out[pair], out[pair + 8] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return out

    queries, keys, held, answers = [], [], [], []
    for position, token in enumerate(tokens):
        x = values["transformer.token_embeddings.weight"][token]
        heads = (layer["attn.qkv_proj.weight"] @ norm(x, layer["attn_norm.weight"])).view(4, 16)
        queries = [turn(norm(head, layer["attn.q_norm.weight"]), position) for head in heads[:2]]
        keys.append(turn(norm(heads[2], layer["attn.k_norm.weight"]), position))
        held.append(heads[3])
        mixed = []
        for query in queries:
            weights = torch.stack([query @ key / 4 for key in keys]).softmax(0)
            mixed.append(sum(weight * value for weight, value in zip(weights, held, strict=True)))
        x = x + layer["attn.out_proj.weight"] @ torch.cat(mixed)
        inner = layer["ffn.proj_1.weight"] @ norm(x, layer["ffn_norm.weight"])
        x = x + layer["ffn.proj_2.weight"] @ (torch.nn.functional.silu(inner[:64]) * inner[64:])
        answers.append(values["lm_head.weight"] @ norm(x, values["transformer.norm.weight"]))
    found = model(input_ids=torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(found.double(), torch.stack(answers), atol=1e-4, rtol=1e-4)


def test_a_shared_head_is_one_parameter_and_not_stored(tmp_path) -> None:
    model = small()
    assert model.lm_head.weight is model.transformer.token_embeddings.weight
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored
    apart = small(share_input_output_layers=False)
    assert apart.lm_head.weight is not apart.transformer.token_embeddings.weight


def test_a_published_folder_loads_through_the_auto_classes(tmp_path) -> None:
    """As downloaded: lists in config.json, an ``auto_map`` to code that is not run, no head in the weights."""
    model = small()
    register()
    register()
    published = {
        "architectures": ["OpenELMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_openelm.OpenELMConfig"},
        "model_type": "openelm",
        "torch_dtype": "float32",
        "transformers_version": "4.39.3",
        "num_query_heads": [2, 4, 4, 4],
        "num_kv_heads": [1, 2, 2, 2],
        "normalization_layer_name": "rms_norm",
        "rope_max_length": 256,
        **SMALL,
        "ffn_multipliers": [0.5, 1.5, 2.5, 3.5],
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    weights = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is OpenELMForCausalLM
    assert not any(told.values()), told
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(loaded.eval()(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_a_plain_feed_forward_and_no_norms_of_queries() -> None:
    model = small(ffn_with_glu=False, normalize_qk_projections=False)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["transformer.layers.3.ffn.proj_1.weight"] == (224, 64)
    assert not any("q_norm" in name or "k_norm" in name for name in shapes)
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


def test_hidden_states_and_attentions_are_recorded() -> None:
    out = small(attn_implementation="eager")(
        input_ids=torch.tensor([[1, 2, 3]]), output_hidden_states=True, output_attentions=True
    )
    assert len(out.hidden_states) == 5
    assert [tuple(weights.shape) for weights in out.attentions] == [(1, heads, 3, 3) for heads in (2, 4, 4, 4)]
