"""What edgeship needs of transformers' attention is there: a red test here names what an upgrade took away."""

from __future__ import annotations

import pytest

from edgeship.compat.transformers_attention import (
    EAGER,
    attend_by_torch,
    choose_attention,
    choose_batched_experts,
    classes_by_name,
    gate_of,
    own_attention,
    register_attention,
)

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 16, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}


def test_an_attention_that_is_registered_is_asked():
    asked = []

    def attend(module, query, key, value, mask, **settings):
        asked.append((module.layer_idx, settings["scaling"], mask))
        return query.transpose(1, 2), None

    register_attention("edgeship_canary", attend, lambda **asked: "mask")
    config = transformers.LlamaConfig(**SIZES)
    choose_attention(config, "edgeship_canary")
    model = transformers.AutoModelForCausalLM.from_config(config)
    import torch

    model(input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=False)
    assert asked == [(0, model.model.layers[0].self_attn.scaling, "mask")]
    choose_attention(model.config, EAGER)
    model(input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=False)
    assert len(asked) == 1


def test_tables_of_classes_take_a_name_for_a_while():
    from transformers.models.falcon import modeling_falcon as falcon

    config = transformers.FalconConfig(vocab_size=16, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    register_attention("edgeship_canary", lambda *_: None, lambda **_: None)
    choose_attention(config, "edgeship_canary")
    with classes_by_name(config, "edgeship_canary"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert "edgeship_canary" not in falcon.FALCON_ATTENTION_CLASSES
    layer = model.transformer.h[0].self_attention
    assert type(layer) is falcon.FALCON_ATTENTION_CLASSES[EAGER]
    attend_by_torch(model)
    assert (layer.config._attn_implementation, config._attn_implementation) == ("sdpa", "edgeship_canary")


def test_layers_have_a_plain_attention_and_experts_a_gate():
    config = transformers.GptOssConfig(
        **SIZES, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, head_dim=8
    )
    choose_batched_experts(config)
    assert config._experts_implementation == "batched_mm"
    model = transformers.AutoModelForCausalLM.from_config(config)
    layer = model.model.layers[0]
    assert own_attention(layer.self_attn).__name__ == "eager_attention_forward"
    assert own_attention(model.lm_head) is None
    assert gate_of(layer.mlp.experts) is not None
    assert gate_of(model.lm_head) is None
