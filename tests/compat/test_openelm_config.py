"""OpenELM's configuration: widths of layers, what is saved, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from small_openelm import SMALL

from edgeship.compat.openelm import register
from edgeship.compat.openelm_config import OpenELMConfig, nearest_multiple, spread
from edgeship.errors import SourceError


def test_multipliers_are_those_of_the_published_file() -> None:
    assert spread((0.5, 4.0), 16, "") == [
        0.5, 0.73, 0.97, 1.2, 1.43, 1.67, 1.9, 2.13, 2.37, 2.6, 2.83, 3.07, 3.3, 3.53, 3.77, 4.0,
    ]  # fmt: skip
    assert spread(2, 3, "") == [2.0, 2.0, 2.0]
    # 280 is nearer to 256, and 256 is more than a tenth under 300.
    assert [nearest_multiple(v, 256) for v in (3, 280, 300, 400)] == [256, 256, 512, 512]


def test_the_configuration_survives_being_saved(tmp_path) -> None:
    register()
    config = OpenELMConfig(**SMALL)
    config.save_pretrained(tmp_path)
    assert "per_layer_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert [layer.num_key_value_heads for layer in again.per_layer_config] == [1, 2, 2, 2]
    assert (again.hidden_size, again.num_hidden_layers, again.tie_word_embeddings) == (64, 4, True)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"num_query_heads": [2, 2]}, "num_query_heads"),
        ({"num_query_heads": [3, 3, 3, 3], "num_kv_heads": [2, 2, 2, 2]}, "multiple"),
        ({"ffn_multipliers": [1.0, 2.0, 3.0]}, "ffn_multipliers"),
        ({"normalization_layer_name": "layer_norm"}, "layer_norm"),
        ({"activation_fn_name": "swoosh"}, "swoosh"),
    ],
)
def test_a_wrong_configuration_is_refused(wrong: dict[str, object], word: str) -> None:
    with pytest.raises(SourceError, match=word):
        OpenELMConfig(**{**SMALL, **wrong})
