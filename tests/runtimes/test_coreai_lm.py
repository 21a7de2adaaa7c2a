"""Core AI's language models: a family's asset is written, opened by Core AI's runtime, and writes what transformers
writes."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from edgeship.compression.encode import Encoder
from edgeship.core.model import TorchModel
from edgeship.core.passes import Context
from edgeship.core.weights import MXFP4, Affine, Float, Palette, Sparse, same_numbers
from edgeship.errors import ArtifactError, UsageError
from edgeship.llm.generation import generate
from edgeship.passes.lower.decoder_to_coreai import DecoderToCoreAI
from edgeship.program.compare import Reference
from edgeship.program.program import TorchProgram
from edgeship.program.routers import WITHIN
from edgeship.runtimes.coreai_lm import RUNTIME

# What is lowered once is used by all of them.
pytestmark = pytest.mark.xdist_group("coreai-lm")

SLOW = ["mistral", "qwen2", "qwen3", "gemma3", "phi3", "smollm3", "olmo2", "mixtral", "qwen3_moe", "falcon", "openelm"]
FAMILIES = ["llama", "gpt2", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("gemma2", *SLOW))]
HALF = ["gpt2", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("llama", "gemma2", *SLOW))]
CONTEXT = 64


@pytest.fixture(scope="module")
def lowered(decoder_model, tmp_path_factory):
    made = {}

    def lower(name, compute="float32"):
        if (name, compute) not in made:
            folder = tmp_path_factory.mktemp(name)
            step = DecoderToCoreAI(CONTEXT, 8, compute)
            made[name, compute] = step.run(decoder_model(name), Context(folder))
            step.ensures(made[name, compute], model=decoder_model(name))
        return made[name, compute]

    return lower


def _decided(model, encoding, folder):
    """The model with every layer's weight in one encoding."""
    program = TorchProgram.open(model)
    wanted = {use.name: encoding for use in program.record.inventory.weights if use.op in ("linear", "embedding")}
    encoded, _ = Encoder(program, wanted).encode()
    record = dataclasses.replace(program.record, encodings=wanted)
    dataclasses.replace(program, encoded=encoded, record=record).save(folder / "program")
    return TorchModel(folder / "program", model.signature), encoded


def _reference(model, tokens):
    with torch.no_grad():
        return TorchProgram.open(model).module()(tokens)[0].numpy()


def _tokens():
    return torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", FAMILIES)
def test_it_writes_what_transformers_writes(name, lowered, continued):
    prompt, wanted = continued(name)
    with RUNTIME.open(lowered(name)) as session:
        assert list(generate(session.stepper, prompt, 32)) == wanted
        session.stepper.reset()
        assert list(generate(session.stepper, prompt, 4)) == wanted[:4]


@pytest.mark.parametrize("name", HALF)
def test_float16_stays_close(name, decoder_model, lowered):
    tokens = _tokens()
    with RUNTIME.open(lowered(name, "float16")) as session:
        found = session.run({"input_ids": tokens.numpy()})["logits"]
    wanted = _reference(decoder_model(name), tokens)
    # Another expert is another answer, and no error of the arithmetic.
    decided = ~Reference(TorchProgram.open(decoder_model(name))).undecided({"input_ids": tokens.numpy()}, WITHIN["f16"])
    assert decided.sum() >= 0.75 * len(decided)
    found, wanted = (logits.reshape(len(decided), -1)[decided] for logits in (found, wanted))
    assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("encoding", "compute"),
    [
        (Affine(8), "float32"),
        (Affine(4, True, "group", 32), "float16"),
        (MXFP4(), "float16"),
        pytest.param(Affine(4, False, "group", 32), "float32", marks=pytest.mark.heavy),
        pytest.param(Affine(3), "float32", marks=pytest.mark.heavy),
        pytest.param(Palette(3, 16), "float32", marks=pytest.mark.heavy),
        pytest.param(Float(16), "float16", marks=pytest.mark.heavy),
    ],
)
def test_weights_are_stored_as_decided_and_once(encoding, compute, decoder_model, tmp_path):
    model, encoded = _decided(decoder_model("llama"), encoding, tmp_path)
    artifact = DecoderToCoreAI(CONTEXT, 8, compute).run(model, Context(tmp_path))
    stored = RUNTIME.read_weights(artifact)
    assert stored.keys() == encoded.keys()
    for name, tensor in encoded.items():
        assert same_numbers(tensor, stored[name], container_bits=RUNTIME.container_bits("linear", encoding)) == ""
    # Each once, and beside it scales, rotations, norms and two graphs.
    size = sum(tensor.encoding.bits * int(np.prod(tensor.shape)) // 8 for tensor in encoded.values())
    assert (artifact.path / "main.mlirb").stat().st_size < 1.6 * size + 60_000
    tokens = _tokens()
    wanted = _reference(model, tokens)
    with RUNTIME.open(artifact) as session:
        found = session.run({"input_ids": tokens.numpy()})["logits"]
    assert np.linalg.norm(found - wanted) < (1e-4 if compute == "float32" else 0.02) * np.linalg.norm(wanted)


def test_the_same_model_gives_the_same_bytes(decoder_model, lowered, tmp_path):
    again = DecoderToCoreAI(CONTEXT, 8, "float32").run(decoder_model("llama"), Context(tmp_path))
    for file in ("main.mlirb", "metadata.json"):
        assert (again.path / file).read_bytes() == (lowered("llama").path / file).read_bytes()


def test_damage_is_named(lowered, tmp_path):
    good = lowered("llama")
    with pytest.raises(ArtifactError, match="states of another shape"):
        RUNTIME.open(dataclasses.replace(good, language=dataclasses.replace(good.language, context=32)))
    broken = dataclasses.replace(good, path=tmp_path / "broken.aimodel")
    shutil.copytree(good.path, broken.path)
    program = broken.path / "main.mlirb"
    content = program.read_bytes()
    for damaged in (b"", content[:5000], content[:-500], content[:300] + b"\xff" * 9 + content[309:]):
        program.write_bytes(damaged)
        for use in (RUNTIME.open, RUNTIME.read_weights):
            with pytest.raises(ArtifactError):
                use(broken)


def test_what_cannot_be_is_refused_before_anything_is_written(decoder_model, tmp_path):
    with pytest.raises(UsageError, match="--context 4096 is not among the 128 positions"):
        DecoderToCoreAI(4096).run(decoder_model("llama"), Context(tmp_path))
    assert not list(tmp_path.iterdir())
    assert "floats" in RUNTIME.holds("linear", Affine(8), "int8")
    assert "dense" in RUNTIME.holds("linear", Sparse(Affine(8)), "float")
    assert RUNTIME.holds("linear", Affine(4, True, "group", 32), "float") == ""
