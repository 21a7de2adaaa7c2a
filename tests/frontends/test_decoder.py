"""Language models from folders: what is read, and what is refused before anything expensive."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeship.core.model import Signature, TorchModel
from edgeship.errors import EdgeshipError, SourceError, UsageError, WeightsError
from edgeship.frontends.decoder import inner_prefix, load_decoder
from edgeship.frontends.llama2c import is_checkpoint, write_folder
from edgeship.frontends.lora import read_adapter
from edgeship.program.program import TorchProgram
from edgeship.program.stored import Overlay, WeightStore


@pytest.fixture
def folder(family, tmp_path):
    return shutil.copytree(family("llama"), tmp_path / "llama")


def edit(path, **changes) -> None:
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def test_weights_stay_in_the_users_files(decoder_model, family) -> None:
    program = TorchProgram.open(decoder_model("llama"))
    assert isinstance(program.weights, WeightStore)
    places = program.weights.places
    files = {place.file for name, place in places.items() if name.startswith("model.")}
    assert files == {family("llama") / "model.safetensors"}
    assert program.record.decoder.family == "llama"
    assert [layer.window for layer in TorchProgram.open(decoder_model("gemma3")).record.decoder.layers] == [
        12,
        12,
        None,
    ]


def test_a_folder_named_from_here_is_found_from_anywhere(folder, tmp_path, monkeypatch) -> None:
    from pathlib import Path

    monkeypatch.chdir(folder.parent)
    load_decoder(Path(folder.name), 16).program.save(tmp_path / "program")
    monkeypatch.chdir("/")
    program = TorchProgram.open(TorchModel(tmp_path / "program", Signature((), ())))
    assert program.weight("model.norm.weight").shape == (64,)


def test_a_missing_shard_is_named(folder) -> None:
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    index = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in set(index.values()):
        part = {name: weights[name] for name in names if index[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert load_decoder(folder, 16).program.record.decoder is not None
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"lacks model-1\.safetensors"):
        load_decoder(folder, 16)


def test_a_cut_shard_is_refused(folder) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="header"):
        load_decoder(folder, 16)


def test_a_missing_tokenizer_is_refused(folder) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"no tokenizer\.json"):
        load_decoder(folder, 16)


def test_tied_weights_given_twice_must_be_the_same(folder) -> None:
    weights = load_file(folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    save_file({**weights, "lm_head.weight": table.clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_decoder(folder, 16).files
    save_file({**weights, "lm_head.weight": table + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight.*two different"):
        load_decoder(folder, 16)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model_type": "lama"}, "knows no language model of type 'lama'"),
        ({"model_type": "lama", "auto_map": {"AutoModel": "x.Y"}}, "brings its own model code"),
        ({"model_type": ...}, "cannot be read"),
        ({"num_attention_heads": "four"}, "num_attention_heads|config"),
        ({"hidden_size": 128}, "cannot be loaded"),
        ({"num_hidden_layers": 4}, "lacks the weight"),
        ({"model_type": "rwkv", "max_position_embeddings": ...}, "rwkv: no layer puts keys and values into a cache"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(folder, changes, error) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(EdgeshipError, match=error):
        load_decoder(folder, 16)


def test_code_that_a_folder_brings_beside_a_known_type_is_named(folder) -> None:
    assert not any("own model code" in line for line in load_decoder(folder, 16).program.record.history)
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    assert any("own model code was not run" in line for line in load_decoder(folder, 16).program.record.history)


def test_texts_longer_than_the_model_are_refused(folder) -> None:
    with pytest.raises(UsageError, match="tokens=129, and the model has 128 positions"):
        load_decoder(folder, 129)


def adapter(folder, layers=("q_proj", "v_proj"), rank=4, width=64, **config):
    folder.mkdir()
    made = {}
    torch.manual_seed(5)
    for name in layers:
        out = {"q_proj": 64, "v_proj": 32}.get(name, 64)
        stem = f"base_model.model.model.layers.1.self_attn.{name}"
        made[f"{stem}.lora_A.weight"] = torch.randn(rank, width)
        made[f"{stem}.lora_B.weight"] = torch.randn(out, rank)
    save_file(made, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "base_model_name_or_path": "someone/base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder, made


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_an_adapter_is_merged(folder, tmp_path, rslora, scale) -> None:
    place, made = adapter(tmp_path / "lora", use_rslora=rslora)
    plain = load_decoder(folder, 16).program
    program = load_decoder(folder, 16, lora=place).program
    for name in ("q_proj", "v_proj"):
        stem = f"base_model.model.model.layers.1.self_attn.{name}"
        wanted = plain.weight(f"model.layers.1.self_attn.{name}.weight") + scale * (
            made[f"{stem}.lora_B.weight"] @ made[f"{stem}.lora_A.weight"]
        )
        assert torch.allclose(program.weight(f"model.layers.1.self_attn.{name}.weight"), wanted, atol=1e-5)
    untouched = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(program.weight(untouched), plain.weight(untouched))
    assert isinstance(program.weights, Overlay)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"layers": ("c_attn",)}, "belongs to another base"),
        ({"width": 128}, "of 64x128, the model has 64x64"),
        ({"peft_type": "IA3"}, "an adapter of kind IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trained biases"),
        ({"r": "many"}, "cannot be read"),
        ({"r": 0}, "rank 0"),
        ({"r": 16}, "says rank 16, and .* has rank 4"),
        ({"lora_bias": True}, "biases in its products"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(family, tmp_path, given, error) -> None:
    place, _ = adapter(tmp_path / "lora", **given)
    shapes = {f"model.layers.1.self_attn.{name}.weight": (out, 64) for name, out in (("q_proj", 64), ("v_proj", 32))}
    with pytest.raises(EdgeshipError, match=error):
        read_adapter(place, shapes)


@pytest.mark.parametrize(
    ("tensor", "value", "error"),
    [
        ("v_proj.lora_B.bias", torch.ones(32), "not part of LoRA"),
        ("o_proj.lora_B.weight", torch.ones(64, 4), "not part of LoRA"),
        ("v_proj.lora_A.weight", torch.full((4, 64), torch.nan), "NaN or infinity"),
    ],
)
def test_adapters_with_more_or_less_than_products_are_refused(tmp_path, tensor, value, error) -> None:
    place, made = adapter(tmp_path / "lora")
    made[f"base_model.model.model.layers.1.self_attn.{tensor}"] = value
    save_file(made, place / "adapter_model.safetensors")
    shapes = {f"model.layers.1.self_attn.{name}.weight": (out, 64) for name, out in (("q_proj", 64), ("v_proj", 32))}
    with pytest.raises(EdgeshipError, match=error):
        read_adapter(place, shapes)


def test_an_adapter_without_its_files_is_refused(tmp_path) -> None:
    with pytest.raises(SourceError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path, {})


def test_llama2c_checkpoints_become_folders(shared, tmp_path) -> None:
    path = shared / "data" / "models" / "stories260k" / "stories260K.bin"
    assert is_checkpoint(path)
    write_folder(path, tmp_path / "hf")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Once upon a time, there was a little girl named Zoë."
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        ids = tokenizer(
            "Once upon a time, there was a little girl named Lily. She loved to play with her toys."
        ).input_ids
        loss = model(torch.tensor([[1, *ids]]), labels=torch.tensor([[1, *ids]])).loss
    assert loss < 1.5, "a random model answers 6.2"


def test_a_cut_llama2c_checkpoint_is_none(tmp_path) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(struct.pack("7i", 64, 172, 5, 8, 4, 512, 512) + np.zeros(1000, np.float32).tobytes())
    assert not is_checkpoint(path)
    path.write_bytes(b"short")
    assert not is_checkpoint(path)


NAMES = ["model.embed.weight", "model.layers.0.up.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        (NAMES, ("", "")),
        ([name.removeprefix("model.") for name in NAMES], ("", "")),
        ([f"language_model.{name}" for name in NAMES], ("language_model.", "")),
        (["model.text.embed.weight", "model.text.layers.0.up.weight", "lm_head.weight"], ("model.text.", "model.")),
        (["other.weight"], ("", "")),
    ],
)
def test_where_a_language_model_lies_in_a_larger_checkpoint(keys, wanted):
    # A part that sees has layers of the same names.
    keys = [*keys, "vision.layers.0.up.weight"]
    assert inner_prefix(NAMES, "model.", keys) == wanted


@pytest.mark.heavy
def test_the_language_model_of_a_model_that_sees_is_loaded_alone(tmp_path):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import zoo_rows

    whole = zoo_rows.make_decoder("gemma3", tmp_path / "model")
    program = load_decoder(tmp_path / "model", 16).program
    tokens = torch.randint(2, 256, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = whole(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(program.module()(tokens)[0], wanted, rtol=1e-3, atol=1e-4)
