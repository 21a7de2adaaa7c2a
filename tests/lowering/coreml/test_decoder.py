"""Language models in Core ML: families write what transformers writes, and weights are stored as they were decided."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from edgeship.core.passes import Context
from edgeship.core.weights import same_numbers
from edgeship.errors import ArtifactError, UsageError
from edgeship.llm.generation import generate
from edgeship.lowering.coreml import neural
from edgeship.passes.lower.decoder_to_coreml import DecoderToCoreML
from edgeship.program.program import TorchProgram
from edgeship.runtimes.coreml.program import load_program
from edgeship.runtimes.coreml_lm import RUNTIME

# What is lowered once is used by all of them.
pytestmark = pytest.mark.xdist_group("coreml-lm")

REBUILT = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "openelm"]
OTHERS = ["mixtral", "qwen3_moe", "falcon", "gpt2"]
QUICK = [("llama", "ane"), ("gemma3", "generic")]
CELLS = [
    *QUICK,
    *(
        pytest.param(family, form, marks=pytest.mark.heavy)
        for form, families in (("ane", REBUILT), ("generic", REBUILT + OTHERS))
        for family in families
        if (family, form) not in QUICK
    ),
]


@pytest.fixture(scope="module")
def lowered(decoder_model, tmp_path_factory):
    """An artifact in float32 by family and form, each written once."""
    made = {}

    def lower(family, form):
        if (family, form) not in made:
            step = DecoderToCoreML(64, 8, "float32", form)
            made[family, form] = step.run(decoder_model(family), Context(tmp_path_factory.mktemp(family)))
        return made[family, form]

    return lower


def _check_weights(model, artifact):
    decided, stored = TorchProgram.open(model).encoded, RUNTIME.read_weights(artifact)
    assert set(stored) == set(decided)
    for name, tensor in decided.items():
        assert (
            same_numbers(tensor, stored[name], container_bits=RUNTIME.container_bits("linear", tensor.encoding)) == ""
        )


def _signal_to_noise(model, artifact):
    """In dB, of a text's logits against the torch program with the same numbers."""
    tokens = torch.randint(2, 256, (1, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = TorchProgram.open(model).module()(tokens)[0].double().numpy()
    with RUNTIME.open(artifact) as session:
        found = session.run({"input_ids": tokens.numpy()})["logits"]
    return 10 * np.log10(np.mean(wanted**2) / np.mean((wanted - found) ** 2))


@pytest.mark.parametrize(("name", "form"), CELLS)
def test_greedy_tokens_are_those_of_transformers(name, form, lowered, continued):
    artifact = lowered(name, form)
    assert artifact.facts["form"] == form
    prompt, wanted = continued(name)
    with RUNTIME.open(artifact) as session:
        assert list(generate(session.stepper, prompt, 32)) == wanted


def test_pieces_and_parts_of_four_bit_weights(decoder_model, tmp_path, monkeypatch, encoded_model):
    monkeypatch.setattr(neural, "MAX_ROWS", 96)
    model = encoded_model(decoder_model("llama"), "int4-g32", tmp_path)
    artifact = DecoderToCoreML(64, 8, form="ane", part_bytes=45_000).run(model, Context(tmp_path))
    assert artifact.compute == "f16"
    functions = load_program(artifact.path).functions
    assert sorted(functions) == ["decode_1", "decode_2", "prefill_1", "prefill_2"]
    assert artifact.facts["parts"] == "2"
    assert int(artifact.facts["largest_part_bytes"]) <= 45_000
    # The table is looked up in the first part and is the head of the last: three pieces, each in the file once.
    counts = Counter(place.weight for place in artifact.placements)
    (table,) = [weight for weight, count in counts.items() if count > 1]
    assert table in ("lm_head.weight", "model.embed_tokens.weight")
    assert counts[table] == 3
    assert len({place.stored for place in artifact.placements}) == len(artifact.placements)
    states = {name: [port.name for port in function.states] for name, function in functions.items()}
    assert not set(states["decode_1"]) & set(states["decode_2"])
    assert set(states["decode_1"]) == set(states["prefill_1"])
    _check_weights(model, artifact)
    assert _signal_to_noise(model, artifact) > 40
    weights = artifact.path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    size = weights.stat().st_size
    # Each encoded weight once: four bits and a scale for 32, with room for tables of angles and small weights.
    assert size < sum(tensor.stored_bytes for tensor in TorchProgram.open(model).encoded.values()) + 60_000
    weights.write_bytes(weights.read_bytes()[: size // 2])
    with pytest.raises(ArtifactError):
        dict(RUNTIME.read_weights(artifact))
    with pytest.raises(ArtifactError):
        RUNTIME.open(artifact)


@pytest.mark.heavy
@pytest.mark.parametrize("form", ["ane", "generic"])
@pytest.mark.parametrize("name", ["int8", "int4-g32-asym", "int3", "palette4-c8", "palette6", "float16"])
def test_weights_are_stored_as_decided(name, form, decoder_model, tmp_path, encoded_model):
    model = encoded_model(decoder_model("qwen2"), name, tmp_path)
    artifact = DecoderToCoreML(64, 8, form=form).run(model, Context(tmp_path))
    _check_weights(model, artifact)
    assert _signal_to_noise(model, artifact) > 40


@pytest.mark.heavy
def test_the_same_program_makes_the_same_bytes(decoder_model, tmp_path):
    contents = []
    for number in ("one", "two"):
        (tmp_path / number).mkdir()
        path = DecoderToCoreML(64, 8).run(decoder_model("llama"), Context(tmp_path / number)).path
        files = sorted(file for file in path.rglob("*") if file.is_file())
        contents.append([(str(file.relative_to(path)), file.read_bytes()) for file in files])
    assert contents[0] == contents[1]


def test_a_context_or_a_form_that_is_not_there_is_refused(decoder_model, tmp_path):
    with pytest.raises(UsageError, match="128"):
        DecoderToCoreML(4096).run(decoder_model("llama"), Context(tmp_path))
    with pytest.raises(UsageError, match="not rebuilt for the Neural Engine"):
        DecoderToCoreML(form="ane").run(decoder_model("gpt2"), Context(tmp_path))
    assert not list(tmp_path.iterdir())
