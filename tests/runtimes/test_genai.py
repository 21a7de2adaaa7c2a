"""onnxruntime-genai: a family's folder is written, opened by the engine, and writes what transformers writes."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from edgeship.compression.encode import Encoder
from edgeship.core.model import TorchModel
from edgeship.core.passes import Context
from edgeship.core.profile import AdapterRef
from edgeship.core.weights import Affine, same_numbers
from edgeship.errors import ArtifactError, UsageError, WeightsError
from edgeship.frontends.decoder import load_decoder
from edgeship.llm.chat import ChatTemplate
from edgeship.llm.generation import generate
from edgeship.lowering.chat_template import genai_template
from edgeship.lowering.onnx.genai import drawing
from edgeship.passes.lower.decoder_to_genai import DecoderToGenai
from edgeship.program.program import TorchProgram
from edgeship.runtimes.genai import RUNTIME

# What is lowered once is used by all of them.
pytestmark = pytest.mark.xdist_group("genai")

SLOW = ["mistral", "qwen2", "qwen3", "gemma3", "phi3", "smollm3", "olmo2", "mixtral", "qwen3_moe", "falcon", "openelm"]
# A window and a soft cap, absolute positions, layers of several sizes.
NARROW = ["gemma2", "gpt2", "openelm"]
FAMILIES = ["llama", "gemma2", "gpt2", *(pytest.param(name, marks=pytest.mark.heavy) for name in SLOW)]


@pytest.fixture(scope="module")
def lowered(decoder_model, tmp_path_factory):
    made = {}

    def lower(name, cache="float32"):
        if (name, cache) not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name, cache] = DecoderToGenai(64, cache=cache).run(decoder_model(name), Context(folder))
        return made[name, cache]

    return lower


@pytest.mark.parametrize("name", FAMILIES)
def test_it_writes_what_transformers_writes(name, lowered, continued) -> None:
    prompt, wanted = continued(name)
    with RUNTIME.open(lowered(name)) as session:
        session.stepper.chunk = 8
        assert list(generate(session.stepper, prompt, 32)) == wanted


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.heavy) for name in NARROW)])
def test_a_cache_of_int8_is_int8_and_close_to_float32(name, lowered, continued) -> None:
    import numpy as np
    import onnx

    plain, narrow = lowered(name), lowered(name, "int8")
    assert (plain.language.cache, narrow.language.cache) == ("float32", "int8")
    assert narrow.facts["cache.scales"] == "one a channel, of 16 texts drawn from a seed"
    graph = onnx.load(narrow.path / "model.onnx", load_external_data=False).graph
    kinds = {value.type.tensor_type.elem_type for value in (*graph.input[3:], *graph.output[1:])}
    assert kinds == {onnx.TensorProto.INT8}
    rng = np.random.default_rng(5)
    tokens = np.array([[*continued(name)[0], *rng.integers(2, 256, 12)]])
    answers = []
    for artifact in (plain, narrow):
        with RUNTIME.open(artifact) as session:
            # Chunks after the first read what was rounded.
            session.stepper.chunk = 8
            answers.append(session.run({"input_ids": tokens})["logits"][0].astype(np.float64))
            assert len(session.time_text(tokens[0, :20].tolist(), 8).tokens) == 8
    one, other = answers
    assert 10 * np.log10((one**2).mean() / ((one - other) ** 2).mean()) > 28
    assert not np.array_equal(one, other)
    losses = [_loss(found, tokens[0]) for found in answers]
    assert abs(losses[0] - losses[1]) < 0.02
    best = np.argsort(one, -1)
    wide = np.take_along_axis(one, best[:, -1:], 1) - np.take_along_axis(one, best[:, -2:-1], 1) > 0.5 * one.std()
    assert wide.sum() > 4
    assert np.array_equal(other.argmax(-1)[wide[:, 0]], best[:, -1][wide[:, 0]])


def _loss(logits, tokens) -> float:
    """Mean cross entropy of each token after those before it."""
    import numpy as np

    shares = logits[:-1] - np.log(np.exp(logits[:-1]).sum(-1, keepdims=True))
    return float(-shares[np.arange(len(tokens) - 1), tokens[1:]].mean())


def test_the_engines_own_loop_writes_the_same(lowered, continued) -> None:
    prompt, wanted = continued("llama")
    with RUNTIME.open(lowered("llama")) as session:
        times = session.time_text(prompt, 32)
        assert list(times.tokens) == wanted
        assert (times.prompt, times.decoded) == (20, 31)
        behind = session.time_text(prompt[10:], 8, depth=prompt[:10])
        assert list(behind.tokens) == wanted[:8]


def test_an_apps_search_options_have_their_effect(lowered, continued) -> None:
    """Greedy unless an app asks to draw; then by its temperature, without a ``top_k`` that it did not ask for."""
    import numpy as np
    import onnxruntime_genai as genai

    prompt, wanted = continued("llama")
    model = genai.Model(str(lowered("llama").path))

    def write(**options) -> list[int]:
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=64, **options)
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array([prompt], np.int32))
        tokens = []
        while len(tokens) < 12 and not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        return tokens

    assert write() == wanted[:12]
    drawn = {tuple(write(do_sample=True, temperature=1.5, random_seed=seed)) for seed in (1, 2, 3)}
    assert len(drawn) > 1
    assert write(do_sample=True, top_k=1) == wanted[:12]
    assert write(do_sample=True, temperature=1e-4) == wanted[:12]


def test_models_say_how_their_tokens_are_drawn(tmp_path) -> None:
    assert drawing(tmp_path) == {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "top_k": null}')
    assert drawing(tmp_path) == {"temperature": 0.6, "top_k": 50, "top_p": 0.9}


@pytest.mark.parametrize("name", ["chatml", "blocks", "headers", "turns", "thinking", "inst"])
def test_the_engine_renders_a_conversation_as_transformers_does(name, lowered, chat_templates) -> None:
    import onnxruntime_genai as genai

    own = ChatTemplate(chat_templates[name], {"bos_token": "<s>", "eos_token": "</s>"}, {})
    tokenizer = genai.Tokenizer(genai.Model(str(lowered("llama").path)))
    talk = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": 'Hello  there\n"quoted" \\ {{x}} é🙂 '},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\n An answer\t<b> "},
        {"role": "user", "content": "And?"},
    ]
    for messages in (talk, talk[1:], talk[1:2], talk[:2]):
        found = tokenizer.apply_chat_template(
            messages=json.dumps(messages), template_str=genai_template(own), add_generation_prompt=True
        )
        assert found == own.render(messages)


def test_a_prompt_is_read_at_once_or_stopped(lowered, continued) -> None:
    prompt, wanted = continued("llama")
    with RUNTIME.open(lowered("llama")) as session:
        assert list(generate(session.stepper, prompt, 12)) == wanted[:12]
        session.stepper.reset()
        assert list(generate(session.stepper, prompt, 12, stopped=lambda: True)) == []


@pytest.mark.parametrize("encoding", [Affine(8), Affine(4, True, "group", 32), Affine(4, False, "group", 16)])
def test_weights_are_stored_as_decided(encoding, decoder_model, tmp_path, continued) -> None:
    model = decoder_model("llama")
    program = TorchProgram.open(model)
    wanted = {use.name: encoding for use in program.record.inventory.weights if use.op in ("linear", "embedding")}
    encoded, _ = Encoder(program, wanted).encode()
    record = dataclasses.replace(program.record, encodings=wanted)
    dataclasses.replace(program, encoded=encoded, record=record).save(tmp_path / "p")
    artifact = DecoderToGenai(64).run(TorchModel(tmp_path / "p", model.signature), Context(tmp_path))
    stored = RUNTIME.read_weights(artifact)
    assert stored.keys() == encoded.keys()
    for name, tensor in encoded.items():
        assert same_numbers(tensor, stored[name]) == ""
    program = TorchProgram.open(TorchModel(tmp_path / "p", model.signature))
    import numpy as np
    import torch

    tokens = torch.tensor([continued("llama")[0] + [3] * 12])
    with torch.no_grad():
        reference = program.module()(tokens)[0].numpy()
    with RUNTIME.open(artifact) as session:
        found = session.run({"input_ids": tokens.numpy()})["logits"]
    assert np.abs(found - reference).max() < 1e-3 * np.abs(reference).max()


def write_adapter(folder, layers, seed, rank=3, dtype=None):
    """A PEFT adapter that changes what llama writes."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    made = {}
    for layer, out, taken in layers:
        stem = f"base_model.model.model.layers.{layer}"
        made[f"{stem}.lora_A.weight"] = torch.randn(rank, taken, generator=generator).to(dtype) * 0.1
        made[f"{stem}.lora_B.weight"] = torch.randn(out, rank, generator=generator).to(dtype) * 0.3
    save_file(made, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.heavy
def test_adapters_beside_a_base_write_what_merged_ones_write(
    family, decoder_model, lowered, continued, tmp_path
) -> None:
    """Of one rank and another, in the same layers and others: the engine switches between them and the base."""
    import torch

    query, down = ("0.self_attn.q_proj", 64, 64), ("2.mlp.down_proj", 64, 96)
    folders = {
        "poet": write_adapter(tmp_path / "one", [query, ("1.self_attn.v_proj", 32, 64)], 1),
        "clerk": write_adapter(tmp_path / "two", [query, down], 2, rank=5, dtype=torch.float16),
    }
    references = tuple(AdapterRef(name, str(folder), "") for name, folder in folders.items())
    prompt, wanted = continued("llama")
    written = {"": wanted}
    for name, folder in folders.items():
        program = load_decoder(family("llama"), 32, lora=folder).program
        program.save(tmp_path / name)
        (tmp_path / f"{name}_merged").mkdir()
        merged = DecoderToGenai(64).run(
            TorchModel(tmp_path / name, program.signature), Context(tmp_path / f"{name}_merged")
        )
        with RUNTIME.open(merged) as session:
            written[name] = list(generate(session.stepper, prompt, 32))
    assert len({tuple(tokens) for tokens in written.values()}) == 3
    artifact = DecoderToGenai(64, adapters=references).run(decoder_model("llama"), Context(tmp_path))
    assert artifact.language.adapters == ("poet", "clerk")
    assert {path.name for path in (artifact.path / "adapters").iterdir()} == {"poet.onnx_adapter", "clerk.onnx_adapter"}
    tokens = {"input_ids": torch.tensor([prompt]).numpy()}
    with RUNTIME.open(lowered("llama")) as session:
        plain = session.run(tokens)["logits"]
    with RUNTIME.open(artifact) as session:
        assert (session.run(tokens)["logits"] == plain).all()
        for name in ("", "poet", "clerk", "", "poet"):
            session.adapt(name)
            assert list(generate(session.stepper, prompt, 32)) == written[name]
            assert list(session.time_text(prompt, 32).tokens) == written[name]
        with pytest.raises(UsageError, match=r"no adapter 'cook'.*poet, clerk"):
            session.adapt("cook")
        (artifact.path / "adapters" / "clerk.onnx_adapter").write_bytes(b"nothing")
    with RUNTIME.open(artifact) as session, pytest.raises(ArtifactError, match="does not load its adapter"):
        session.adapt("clerk")


def test_an_adapter_for_another_base_is_refused(decoder_model, tmp_path) -> None:
    folder = write_adapter(tmp_path / "other", [("0.self_attn.q_proj", 64, 80)], 1)
    with pytest.raises(WeightsError, match="belongs to another base"):
        DecoderToGenai(64, adapters=(AdapterRef("a", str(folder), ""),)).run(decoder_model("llama"), Context(tmp_path))


def test_a_damaged_folder_is_refused(lowered, tmp_path) -> None:
    good = lowered("llama")
    folder = tmp_path / "genai"
    shutil.copytree(good.path, folder)
    artifact = dataclasses.replace(good, path=folder)
    (folder / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="does not load"):
        RUNTIME.open(artifact)
    with pytest.raises(ArtifactError, match="does not read"):
        RUNTIME.read_weights(artifact)


def test_the_configuration_is_the_models(lowered) -> None:
    settings = json.loads((lowered("gemma2").path / "genai_config.json").read_text())
    decoder = settings["model"]["decoder"]
    assert (decoder["head_size"], decoder["num_key_value_heads"], settings["model"]["context_length"]) == (16, 2, 64)
    assert (lowered("gemma2").path / "tokenizer.json").is_file()


def test_a_context_beyond_the_models_is_refused(decoder_model, tmp_path) -> None:
    with pytest.raises(UsageError, match="--context 4096 is not among the 128 positions"):
        DecoderToGenai(4096).run(decoder_model("llama"), Context(tmp_path))
    assert not list(tmp_path.iterdir())
