"""Configurations as their makers saved them."""

from __future__ import annotations

import json
import math

import pytest

from edgeship.errors import SourceError
from edgeship.llm.models import read_config, settings_of


def test_infinities_are_read_as_transformers_writes_them(tmp_path):
    import transformers

    transformers.Mamba2Config(num_heads=8, head_dim=16, hidden_size=64).save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert settings_of(tmp_path)["time_step_limit"] == [0.0, math.inf]
    assert read_config(tmp_path).time_step_limit[1] == math.inf


@pytest.mark.parametrize("text", ["[]", "7", "{", '{"__float__": "Infinity"}'])
def test_other_json_is_no_configuration(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match=r"config\.json cannot be read"):
        read_config(tmp_path)


def test_a_language_model_that_is_only_a_part_is_refused_in_words(tmp_path, monkeypatch):
    import transformers

    config = transformers.MllamaConfig().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # The library makes the whole, but no model of its text part.
    monkeypatch.setattr(transformers, "MODEL_FOR_CAUSAL_LM_MAPPING", {})
    with pytest.raises(SourceError, match="no model of the mllama_text_model inside of mllama by itself"):
        read_config(tmp_path)
