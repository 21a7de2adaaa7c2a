"""onnxruntime-genai: a family's folder is written, opened by the engine, and writes what transformers writes."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from edgeship.compression.encode import Encoder
from edgeship.core.model import TorchModel
from edgeship.core.passes import Context
from edgeship.core.weights import Affine, same_numbers
from edgeship.errors import ArtifactError, UsageError
from edgeship.llm.generation import generate
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
    assert (plain.facts["cache"], narrow.facts["cache"]) == ("float32", "int8")
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
