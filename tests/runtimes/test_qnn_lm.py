"""Hexagon's language models: steps with a host say what transformers says; the emulator says what the graph says."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from edgeship.compression.encode import Encoder
from edgeship.core.model import TorchModel
from edgeship.core.passes import Context
from edgeship.core.weights import Affine, same_numbers
from edgeship.errors import ArtifactError, UsageError
from edgeship.llm.generation import generate
from edgeship.llm.hosted import Host, HostedStepper
from edgeship.lowering.qnn.decoder import angle_tables, step_program
from edgeship.passes.lower.decoder_to_qnn import DecoderToQnn
from edgeship.program.program import TorchProgram
from edgeship.runtimes.qnn_lm import RUNTIME

# What is lowered once is used by all of them.
pytestmark = pytest.mark.xdist_group("qnn-lm")

SLOW = ["mistral", "qwen2", "qwen3", "gemma3", "phi3", "smollm3", "olmo2", "mixtral", "qwen3_moe", "falcon", "openelm"]
FAMILIES = ["llama", "gemma2", "gpt2", *(pytest.param(name, marks=pytest.mark.heavy) for name in SLOW)]
CONTEXT, CHUNK = 64, 8


def _reference(program):
    """The steps before anything is quantized, in torch."""
    host = Host.of(program.record.decoder, CONTEXT, angle_tables(program, CONTEXT))
    runners = {
        name: step_program(program, host, tokens, logits=tokens == 1).runner()
        for name, tokens in (("prefill", CHUNK), ("decode", 1))
    }
    return HostedStepper(host, CHUNK, lambda name, inputs: runners[name](inputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_hosted_steps_write_what_transformers_writes(name, decoder_model, continued):
    prompt, wanted = continued(name)
    assert list(generate(_reference(TorchProgram.open(decoder_model(name))), prompt, 32)) == wanted


@pytest.fixture(scope="module")
def lowered(decoder_model, tmp_path_factory):
    """A family in 8 bits (``short``: linear layers in 4), as it was decided, and its artifact."""
    made = {}

    def lower(name, short=False):
        if (name, short) not in made:
            folder = tmp_path_factory.mktemp(name)
            program = TorchProgram.open(decoder_model(name))
            uses = [use for use in program.record.inventory.weights if use.op in ("linear", "embedding")]
            wanted = {use.name: Affine(4 if short and "proj" in use.name else 8) for use in uses}
            encoded, _ = Encoder(program, wanted).encode()
            record = dataclasses.replace(program.record, encodings=wanted)
            dataclasses.replace(program, encoded=encoded, record=record).save(folder / "program")
            model = TorchModel(folder / "program", program.signature)
            artifact = DecoderToQnn(CONTEXT, CHUNK, 57, 75).run(model, Context(folder))
            made[name, short] = model, encoded, artifact
        return made[name, short]

    return lower


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("llama", False),
        *(
            pytest.param(*case, marks=pytest.mark.heavy)
            for case in (("llama", True), ("gpt2", False), ("qwen3_moe", False))
        ),
    ],
)
def test_the_emulator_says_what_the_graphs_say(name, short, lowered, tmp_path):
    model, encoded, artifact = lowered(name, short)
    stored = RUNTIME.read_weights(artifact)
    assert stored.keys() == encoded.keys()
    for weight, tensor in encoded.items():
        assert same_numbers(tensor, stored[weight], container_bits=tensor.encoding.bits) == ""
    tokens = np.random.default_rng(5).integers(2, 256, (1, 32))
    with torch.no_grad():
        wanted = TorchProgram.open(model).module()(torch.from_numpy(tokens))[0].numpy()
    with RUNTIME.open(artifact) as session:
        emulated = session.run({"input_ids": tokens})["logits"]
    # Without contexts the graphs run on the CPU.
    graphs = tmp_path / "graphs"
    shutil.copytree(artifact.path, graphs, ignore=shutil.ignore_patterns("*_ctx*"))
    plain = dataclasses.replace(artifact, path=graphs, facts={**artifact.facts, "qnn.contexts": "to be made"})
    with RUNTIME.open(plain) as session:
        computed = session.run({"input_ids": tokens})["logits"]
    assert np.linalg.norm(emulated - computed) < 0.02 * np.linalg.norm(wanted)
    assert np.linalg.norm(computed - wanted) < 0.004 * np.linalg.norm(wanted)


def test_damage_is_named(lowered, tmp_path):
    _, _, good = lowered("llama")
    with pytest.raises(ArtifactError, match="another context"):
        RUNTIME.open(dataclasses.replace(good, language=dataclasses.replace(good.language, context=32)))
    for name in ("decode_ctx.onnx", "decode_ctx_qnn.bin", "decode.qdq.onnx", "angles.safetensors"):
        broken = dataclasses.replace(good, path=tmp_path / name)
        shutil.copytree(good.path, broken.path)
        (broken.path / name).write_bytes(b"nothing")
        with pytest.raises(ArtifactError):
            RUNTIME.open(broken)
        (broken.path / name).unlink()
        with pytest.raises(ArtifactError):
            RUNTIME.open(broken)


def test_what_cannot_be_is_refused_before_anything_is_written(decoder_model, tmp_path):
    with pytest.raises(UsageError, match="--context 4096 is not among the 128 positions"):
        DecoderToQnn(4096).run(decoder_model("llama"), Context(tmp_path))
    assert not list(tmp_path.iterdir())
    assert "16-bit" in RUNTIME.holds("linear", Affine(8), "int8")
    assert RUNTIME.holds("linear", Affine(4), "int16") == ""
