"""Families that the goal names, and one of each kind that was mended, through the engines that say whether a graph is
right: 32 greedy tokens and the logits of a text, beside transformers' own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import zoo_configs
import zoo_rows

NAMED = (
    "vaultgemma", "gemma3n_text", "gemma4_text", "qwen3_5_text", "gpt_oss", "deepseek_v2", "deepseek_v3", "diffllama",
    "gptj", "gpt_neo", "codegen",
)  # fmt: skip
KINDS = (
    "afmoe",  # views the heads of an attention as one row
    "mvp",  # counts positions itself
    "lfm2",  # the last inputs of a convolution, beside attention
    "mamba2",  # states alone
    "qwen3_next",  # a sum over outer products, beside attention
    "gemma3",  # inside of a model that sees
    "roberta",  # positions that begin behind that of padding
    "recurrent_gemma",  # states that layers hold in themselves
)
# A table of who sees whom in the layers themselves, which counts from the end of what is cached.
REFUSED = {
    ("gpt_neo", "litert-lm"): "layers 0, 1 attend in code of their own",
    ("mamba2", "litert-lm"): "LiteRT-LM opens no model without keys and values",
}


@pytest.mark.heavy
@pytest.mark.parametrize("engine", ["genai", "litert-lm"])
@pytest.mark.parametrize("name", [*NAMED, *KINDS])
def test_greedy_tokens_are_those_of_transformers_or_it_is_refused(name, engine, tmp_path):
    (found,) = zoo_rows.measure("decoder", name, [engine], tmp_path).values()
    refused = REFUSED.get((name, engine))
    assert found["state"] == ("refused" if refused else "passed"), found
    if refused:
        assert refused in found["line"]


def test_small_configurations_keep_each_kind_of_layer():
    small = zoo_configs.small_configuration("gemma3_text")
    assert (small.hidden_size, small.num_hidden_layers, small.vocab_size) == (64, 2, 256)
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert zoo_configs.small_configuration("bert", decoder=True).is_decoder
    assert zoo_configs.small_configuration("mamba2").num_heads == 8


def test_a_network_of_stages_keeps_their_number_and_a_backbone_its_ends():
    swin = zoo_configs.small_configuration("swin")
    assert list(swin.depths) == [2, 1, 1, 1]
    assert all(swin.embed_dim * 2**i % heads == 0 for i, heads in enumerate(swin.num_heads))
    backbone = zoo_configs.small_configuration("depth_anything").backbone_config
    assert (backbone.num_hidden_layers, list(backbone.out_indices)) == (4, [1, 2, 3, 4])
    found = zoo_configs.small_configuration("rt_detr")
    assert found.encoder_in_channels == found.backbone_config.hidden_sizes[1:]
    assert found.decoder_in_channels == [found.encoder_hidden_dim] * 3
    assert zoo_configs.small_configuration("detr").backbone_config.model_type == "resnet"
    assert zoo_configs.small_configuration("yolos").image_size == [64, 64]


def test_a_row_goes_to_the_same_runtimes_in_every_run():
    shares = [zoo_rows.runtimes_of("vision", f"model{i}") for i in range(300)]
    assert all(row[:2] == ["onnx", "tflite"] for row in shares)
    assert 60 < sum("coreml" in row for row in shares) < 140
    assert 10 < sum("qnn" in row for row in shares) < 60
    assert shares == [zoo_rows.runtimes_of("vision", f"model{i}") for i in range(300)]
