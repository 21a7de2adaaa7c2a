"""What a probe shows of decoders that nobody here wrote: caches, attentions, and what is refused."""

from __future__ import annotations

import pytest
import torch

from edgeship.compat.transformers_attention import choose_attention, choose_batched_experts
from edgeship.errors import UnsupportedOpError
from edgeship.llm import attention
from edgeship.llm.cache import CHOOSING
from edgeship.llm.understanding import understand

SIZES = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "head_dim": 4, "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 24,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip


def probed(name, **settings):
    import transformers

    attention.register()
    config = getattr(transformers, name)(**{**SIZES, **settings})
    choose_attention(config, attention.NAME)
    choose_batched_experts(config)
    return understand(config)


def test_offsets_and_caps_of_a_decoder_with_windows():
    found = probed("VaultGemmaConfig", sliding_window=12, layer_types=MIXED, query_pre_attn_scalar=16)
    assert [(layer.kv_heads, layer.head_dim, layer.window) for layer in found.layers] == [(2, 8, 12), (2, 8, None)]
    assert [(call.cache, call.scaling, call.softcap, call.own) for call in found.calls] == [
        (0, 0.25, 50.0, ""),
        (1, 0.25, 50.0, ""),
    ]
    assert (found.notes, found.fixed, found.growing, found.counted) == ((), "", "", False)


def test_sinks_and_fused_experts():
    found = probed("GptOssConfig", num_local_experts=2, num_experts_per_tok=1, sliding_window=12, layer_types=MIXED)
    assert [(call.cache, call.window, call.sinks, call.own) for call in found.calls] == [
        (0, 12, True, ""),
        (1, None, True, ""),
    ]


def test_latent_attention_caches_what_keys_and_values_are_made_of():
    found = probed("DeepseekV3Config", n_group=1, topk_group=1, **LATENT)
    # The latent and the narrower rotated part of keys, for all heads together.
    assert [(layer.heads, layer.kv_heads, layer.head_dim) for layer in found.layers] == [(4, 1, 8)] * 2
    assert [(call.cache, call.own) for call in found.calls] == [(None, "")] * 2
    assert found.notes == (
        "caches of layers 0, 1 are not read as they lie by one attention: plain operators read them",
    )


def test_two_attentions_over_halves_of_a_cache_are_not_the_caches_own():
    found = probed("DiffLlamaConfig")
    assert len(found.layers) == 2
    assert [(call.cache, call.own) for call in found.calls] == [(None, "")] * 4


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("GPTJConfig", {"rotary_dim": 4}),
        ("CodeGenConfig", {"rotary_dim": 4}),
        ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    ],
)
def test_layers_with_code_of_their_own_are_named(name, settings):
    found = probed(
        name, n_embd=32, n_layer=2, n_head=4, **{k: v for k, v in settings.items() if k.startswith("rotary")}
    )
    assert (len(found.layers), found.calls, found.fixed, found.growing) == (2, (), "", "")
    assert found.notes == ("layers 0, 1 attend in code of their own, which stays as it is",)


def test_a_table_of_who_sees_whom_holds_only_in_caches_that_grow():
    found = probed(
        "GPTNeoConfig", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=12
    )
    assert "answers otherwise than for a whole text" in found.fixed
    assert found.growing == ""


def test_layers_that_share_a_cache_read_it_together():
    found = probed(
        "Gemma4TextConfig", num_kv_shared_layers=1, num_hidden_layers=3, sliding_window=12, global_head_dim=16,
        layer_types=["full_attention", "sliding_attention", "full_attention"], hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=32,
    )  # fmt: skip
    assert [(layer.kv_heads, layer.head_dim, layer.window) for layer in found.layers] == [(2, 16, None), (2, 8, 12)]
    assert [(call.cache, call.causal) for call in found.calls] == [(None, True), (1, True), (None, True)]


def test_states_of_fixed_size_are_found_with_their_shapes():
    layers = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    found = probed("Qwen3_5TextConfig", layer_types=["linear_attention", "full_attention"], **layers)
    # Queries, keys and values through one convolution of four tokens; a sum of outer products for each head.
    assert [(state.key, state.shape) for state in found.states] == [
        (("conv", 0, 0), (1, 48, 4)),
        (("recurrent", 0, 0), (1, 2, 8, 8)),
    ]
    assert [layer.number for layer in found.layers] == [1]
    assert (found.fixed, found.growing) == ("", "")
    plain = probed("Qwen3_5TextConfig", layer_types=["full_attention"] * 2, **layers)
    assert (plain.states, plain.notes) == ((), ())


def test_states_in_attributes_of_layers_are_found_by_what_each_step_changes():
    found = probed("RecurrentGemmaConfig", num_hidden_layers=3, lru_width=32, attention_window_size=12)
    block = "model.layers.{}.temporal_block."
    assert {state.name: state.shape for state in found.states} == {
        block.format(0) + "conv1d_state": (1, 32, 3),
        block.format(1) + "conv1d_state": (1, 32, 3),
        block.format(0) + "rg_lru.recurrent_states": (1, 32),
        block.format(1) + "rg_lru.recurrent_states": (1, 32),
    }
    assert len({state.key for state in found.states}) == 4
    assert ([layer.number for layer in found.layers], found.fixed, found.growing) == ([2], "", "")


def test_keys_that_choose_tokens_are_caches_beside_the_others():
    chosen = {"index_n_heads": 8, "index_head_dim": 12, "index_topk": 4}
    found = probed("DeepseekV32Config", n_group=1, topk_group=1, **LATENT, **chosen)
    assert [(layer.kv_heads, layer.head_dim, layer.number) for layer in found.layers] == [
        (1, 8, None),
        (1, 8, None),
        (1, 12, CHOOSING),
        (1, 12, CHOOSING + 1),
    ]
    # What is hidden is not the usual.
    assert [call.causal for call in found.calls] == [False, False]
    assert found.fixed == ""
    assert found.growing.endswith("its layers choose a number of tokens, and a text begins with fewer")


@pytest.mark.parametrize(("name", "told"), [("RobertaConfig", False), ("BertConfig", True)])
def test_positions_that_begin_behind_those_of_padding_are_counted_by_the_model(name, told):
    found = probed(name, is_decoder=True)
    assert (found.told, found.counted, found.fixed, found.growing) == (told, not told, "", "")
    assert len(found.layers) == 2


def test_states_that_no_cache_is_asked_for_are_refused_in_words():
    with pytest.raises(UnsupportedOpError, match="no layer puts keys and values into a cache"):
        probed("RwkvConfig", attention_hidden_size=32, context_length=64)


def test_an_attention_that_scores_otherwise_stays_as_it_is_written(monkeypatch):
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.eager_attention_forward

    def squared(module, query, key, value, mask, **settings):
        # Scores are squared in the second layer.
        if module.layer_idx == 0:
            return plain(module, query, key, value, mask, **settings)
        key, value = (part.repeat_interleave(2, dim=1) for part in (key, value))
        scores = torch.matmul(query, key.transpose(2, 3)).square() * 0.1
        return torch.matmul(torch.softmax(scores + mask, -1), value).transpose(1, 2), None

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", squared)
    found = probed("LlamaConfig")
    assert [bool(call.own) for call in found.calls] == [False, True]
    assert found.notes == (
        "attention of layers 1 stays in the model's own operators: "
        "it scores otherwise than by scaled products, a cap, a mask, a bias and sinks",
    )
