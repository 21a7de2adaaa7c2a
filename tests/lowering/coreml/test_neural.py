"""What float16 and the Neural Engine need is checked against the plain form: norms, angles, rebuilt layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from edgeship.errors import LoweringError
from edgeship.llm.models import describe, read_config
from edgeship.llm.understanding import understand
from edgeship.lowering.coreml import check
from edgeship.lowering.coreml.stateful import Tables, scaled_norm

REBUILT = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "openelm"]


OTHERS = ["mixtral", "qwen3_moe", "falcon", "gpt2"]


def _described(folder):
    config = read_config(folder)
    return config, describe(config, understand(config), folder)


@pytest.mark.parametrize("name", REBUILT)
def test_layers_are_taken_apart_and_answer_as_the_model_does(name, family):
    config, decoder = _described(family(name))
    roles = check.checked_roles(config, decoder.layers)
    assert len(roles) == len(decoder.layers)
    kinds = {"gemma3": ["sliding_attention", "sliding_attention", "full_attention"], "smollm3": ["", "", None]}
    assert [role.rotary for role in roles] == kinds.get(name, [""] * len(roles))


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_parts_are_left_as_they_are(name, family):
    config, decoder = _described(family(name))
    with pytest.raises(LoweringError, match="not rebuilt for the Neural Engine"):
        check.checked_roles(config, decoder.layers)


@pytest.mark.parametrize(
    "mistake",
    [{"rotary": None}, {"scaling": 1.0}, {"norms": ()}, {"softcap": 0.5}, {"gated": False}],
)
def test_wrong_parts_are_found(mistake, family, monkeypatch):
    config, decoder = _described(family("llama"))
    right = check.find_roles

    def wrong(*args):
        roles = [dataclasses.replace(role, **mistake) for role in right(*args)]
        if "gated" in mistake:
            return [dataclasses.replace(role, inner=role.inner[:1]) for role in roles]
        return roles

    monkeypatch.setattr(check, "find_roles", wrong)
    with pytest.raises(LoweringError, match="give other answers"):
        check.checked_roles(config, decoder.layers)


@pytest.mark.parametrize("size", [30000.0, 300.0, 1.0, 1e-3, 1e-5])
def test_norms_hold_in_float16(size):
    x = (torch.randn(1, 4, 512, generator=torch.Generator().manual_seed(0)) * size / 4).half()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    found = scaled_norm(x, -1, 1e-6)
    assert found.dtype == torch.float16
    # What float16 itself rounds away from a number of 1e-5 is a hundredth.
    assert float((found.double() - exact).abs().max() / exact.abs().max()) < (2e-2 if size < 1e-4 else 5e-3)


def test_angles_that_depend_on_the_length_of_the_text_are_refused():
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    config = Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 32,
        },
    )
    assert Tables(Phi3RotaryEmbedding(config), 32).kinds == [None]
    for context in (64, 48, 33):
        with pytest.raises(LoweringError, match="longer texts") as told:
            Tables(Phi3RotaryEmbedding(config), context)
        # The size that is proposed is the longest that is taken.
        assert told.value.fix == "--context 32 has the same ones throughout"
