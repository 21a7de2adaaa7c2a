"""Inputs of Hugging Face models: names from the model, tensors from optimum, sizes from the folder or the user."""

from __future__ import annotations

import json
import random
import sys

import pytest
import torch
import transformers as t

from edgeship.core.model import TensorSpec
from edgeship.frontends import dummies
from edgeship.frontends.huggingface import _inputs, _task, outputs_of

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = {"vocab_size": 60, "max_position_embeddings": 32, **SMALL}
SEQ2SEQ = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
WHISPER = {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 8}
STAGES = {"hidden_sizes": [8, 8], "depths": [1, 1]}
WAVE = {
    "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
TOWERS = {
    "text_config": {"projection_dim": 8, **TEXT},
    "vision_config": {"image_size": 16, "patch_size": 8, "projection_dim": 8, **SMALL},
}
MODELS = {
    "text-classification": (
        lambda: t.BertForSequenceClassification(t.BertConfig(**TEXT)),
        "input_ids:i64[1,32] attention_mask:i64[1,32]",
    ),
    "multiple-choice": (
        lambda: t.BertForMultipleChoice(t.BertConfig(**TEXT)),
        "input_ids:i64[1,4,32] attention_mask:i64[1,4,32]",
    ),
    "boxes": (
        lambda: t.LayoutLMModel(t.LayoutLMConfig(**TEXT)),
        "input_ids:i64[1,32] attention_mask:i64[1,32] bbox:i64[1,32,4]",
    ),
    "long text": (
        lambda: t.LongformerModel(t.LongformerConfig(attention_window=4, **{**TEXT, "max_position_embeddings": 140})),
        "input_ids:i64[1,128] attention_mask:i64[1,128]",
    ),
    "image": (
        lambda: t.ViTForImageClassification(t.ViTConfig(image_size=16, patch_size=8, **SMALL)),
        "pixel_values:f32[1,3,16,16]",
    ),
    "image of any size": (
        lambda: t.ResNetForImageClassification(t.ResNetConfig(embedding_size=8, **STAGES)),
        "pixel_values:f32[1,3,224,224]",
    ),
    "an architecture that optimum has no configuration of": (
        lambda: t.ConvNextForImageClassification(t.ConvNextConfig(num_stages=2, image_size=64, **STAGES)),
        "pixel_values:f32[1,3,64,64]",
    ),
    "text and image": (
        lambda: t.CLIPModel(t.CLIPConfig(**TOWERS)),
        "input_ids:i64[1,32] pixel_values:f32[1,3,16,16] attention_mask:i64[1,32]",
    ),
    "speech to text": (
        lambda: t.WhisperForConditionalGeneration(t.WhisperConfig(**WHISPER)),
        "input_features:f32[1,8,20] decoder_input_ids:i64[1,8]",
    ),
    "waveform": (
        lambda: t.Wav2Vec2ForCTC(t.Wav2Vec2Config(vocab_size=60, **WAVE, **SMALL)),
        "input_values:f32[1,16000]",
    ),
    "spectrogram": (
        lambda: t.ASTForAudioClassification(t.ASTConfig(max_length=64, num_mel_bins=32, **SMALL)),
        "input_values:f32[1,64,32]",
    ),
    "text to text": (
        lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        "input_ids:i64[1,128] attention_mask:i64[1,128] decoder_input_ids:i64[1,128]",
    ),
    "series": (
        lambda: t.PatchTSTForPrediction(
            t.PatchTSTConfig(
                num_input_channels=2,
                context_length=32,
                prediction_length=4,
                d_model=16,
                ffn_dim=16,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        ),
        "past_values:f32[1,32,2]",
    ),
}


def made(model, tmp_path, *given: TensorSpec):
    return _inputs(model.eval(), tmp_path, _task(model), given)


@pytest.mark.parametrize("kind", MODELS)
def test_optimum_makes_inputs_that_the_model_runs_on(kind, tmp_path, monkeypatch):
    build, expected = MODELS[kind]
    model = build().eval()
    used = []
    original = dummies._generated
    monkeypatch.setattr(dummies, "_generated", lambda *args: used.append(original(*args)) or used[-1])
    found = made(model, tmp_path)
    assert " ".join(str(spec) for spec, _ in found) == expected
    assert all(tensor is not None for tensor in used), "drawn here, where optimum could"
    with torch.no_grad():
        assert outputs_of(model, {spec.name: example for spec, example in found})
    for spec, example in found:
        assert tuple(example.shape) == spec.shape
        if spec.high is not None:
            assert spec.low <= int(example.min()) <= int(example.max()) <= spec.high


def test_examples_are_the_same_in_every_run_and_leave_the_generators_as_they_were(tmp_path):
    model = MODELS["text-classification"][0]()
    states = random.getstate(), torch.random.get_rng_state()
    first = made(model, tmp_path)
    assert random.getstate() == states[0]
    assert torch.equal(torch.random.get_rng_state(), states[1])
    random.seed(99)
    torch.manual_seed(99)
    second = made(model, tmp_path)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))
    mask = first[1][1]
    assert 0 < int(mask.sum()) < mask.numel(), "padding is part of what is traced and compared"


def test_a_size_given_for_one_input_holds_for_its_neighbours(tmp_path):
    found = made(MODELS["boxes"][0](), tmp_path, TensorSpec("attention_mask", "i64", (1, 8)))
    assert [spec.shape for spec, _ in found] == [(1, 8), (1, 8), (1, 8, 4)]


def test_the_processor_counts_more_than_the_configuration(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"crop_size": {"height": 48, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.2] * 3})
    )
    ((spec, example),) = made(MODELS["an architecture that optimum has no configuration of"][0](), tmp_path)
    assert spec.shape == tuple(example.shape) == (1, 3, 48, 32)
    assert (spec.layout, spec.mean, spec.std) == ("NCHW", (0.5,) * 3, (0.2,) * 3)


@pytest.mark.parametrize("kind", ["text-classification", "image", "speech to text", "waveform"])
def test_without_optimum_inputs_are_drawn_here(kind, tmp_path, monkeypatch):
    model = MODELS[kind][0]().eval()
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "optimum"] + ["optimum"]:
            patch.setitem(sys.modules, name, None)
        found = _inputs(model, tmp_path, _task(model), ())
    assert " ".join(str(spec) for spec, _ in found) == MODELS[kind][1]
    with torch.no_grad():
        assert outputs_of(model, {spec.name: example for spec, example in found})
