"""The Core AI plug-in: sessions, weights from the bytes of the file, and damage of every kind."""

import asyncio
import hashlib
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeship.compression.affine import quantize_nearest, to_float16
from edgeship.core.model import CoreAIModel, Placement, TensorSpec
from edgeship.core.weights import Affine, Float, FloatTensor, same_numbers
from edgeship.errors import ArtifactError, DataError, EdgeshipError
from edgeship.passes.lower.torch_to_coreai import TorchToCoreAI
from edgeship.program.export import make_program
from edgeship.runtimes.coreai.bytecode import named_blobs
from edgeship.runtimes.coreai.runtime import RUNTIME

INPUTS = {
    "x": np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32),
    "ids": np.array([[3, 1, 39, 0, 7]]),
}


@pytest.fixture(scope="module")
def program(layers_program, with_encoded):
    weights = layers_program.weights
    return with_encoded(
        layers_program,
        {
            "stem.weight": quantize_nearest(weights["stem.weight"], Affine()),
            "first.weight": quantize_nearest(weights["first.weight"], Affine(4)),
            "second.weight": to_float16(weights["second.weight"]),
            # The converter folds a new axis into this one, which changes its name and shape.
            "wave.weight": to_float16(weights["wave.weight"]),
        },
    )


@pytest.fixture(scope="module")
def artifact(program, lower) -> CoreAIModel:
    return lower(program, TorchToCoreAI())


@pytest.fixture
def copied(artifact, tmp_path) -> CoreAIModel:
    """A copy to damage."""
    shutil.copytree(artifact.path, tmp_path / "model.aimodel")
    return replace(artifact, path=tmp_path / "model.aimodel")


def test_a_session_answers_with_the_signature(artifact, program) -> None:
    assert [spec.dtype for spec in artifact.signature.inputs] == ["f32", "i32"]
    with RUNTIME.open(artifact) as session:
        found = session.run(INPUTS)
        again = session.run(INPUTS)
    wanted = program.module()(torch.from_numpy(INPUTS["x"]), torch.from_numpy(INPUTS["ids"]))
    assert list(found) == ["image", "text"]
    for name, reference in zip(found, wanted, strict=True):
        np.testing.assert_allclose(found[name], reference.detach().numpy(), atol=0.02 * float(reference.abs().max()))
        np.testing.assert_array_equal(found[name], again[name])


def test_an_input_without_axes_arrives_without_axes(lower) -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor, rate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x * rate, rate + 1

    specs = [TensorSpec("x", "f32", (1, 4)), TensorSpec("rate", "f32", ())]
    made = make_program(Scaled(), specs, [torch.ones(1, 4), torch.tensor(2.0)])
    with RUNTIME.open(lower(made, TorchToCoreAI())) as session:
        found = session.run({"x": np.ones((1, 4), np.float32), "rate": np.asarray(2.0, np.float32)})
    assert found["output"].tolist() == [[2.0, 2.0, 2.0, 2.0]]
    assert found["output_1"].shape == ()
    assert found["output_1"] == 3.0


def test_it_works_inside_an_event_loop(artifact) -> None:
    async def notebook() -> dict[str, np.ndarray]:
        with RUNTIME.open(artifact) as session:
            return session.run(INPUTS)

    assert asyncio.run(notebook())["image"].dtype == np.float32


def test_closing_twice_and_what_is_wrong_with_inputs(artifact) -> None:
    session = RUNTIME.open(artifact)
    with pytest.raises(DataError, match="input ids is missing"):
        session.run({"x": INPUTS["x"]})
    with pytest.raises(DataError, match=r"x has shape \(1, 3, 8, 8\); the model takes \(1, 3, 16, 16\)"):
        session.run({**INPUTS, "x": INPUTS["x"][:, :, :8, :8]})
    with pytest.raises(EdgeshipError, match="do not fit int32"):
        session.run({**INPUTS, "ids": INPUTS["ids"] + 2**40})
    session.close()
    session.close()


def test_weights_come_back_equal(artifact, program) -> None:
    found = RUNTIME.read_weights(artifact)
    assert {name: same_numbers(tensor, found[name]) for name, tensor in program.encoded.items()} == dict.fromkeys(
        found, ""
    )
    places = {placement.weight: placement for placement in artifact.placements}
    assert places["stem.weight"].stored == "stem.weight"
    assert places["wave.weight"].permutation is not None


@pytest.mark.parametrize("weight", ["stem.weight", "first.weight", "second.weight"])
def test_one_changed_bit_is_another_weight(weight, copied, program) -> None:
    file = copied.path / "main.mlirb"
    data = bytearray(file.read_bytes())
    start = data.find(bytes(named_blobs(file)[weight]))
    data[start + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"does not match main\.hash"):
        RUNTIME.read_weights(copied)
    # Whoever changes the digest too still changes the numbers that are read.
    (copied.path / "main.hash").write_bytes(hashlib.sha256(data).digest())
    found = RUNTIME.read_weights(copied)
    assert same_numbers(program.encoded[weight], found[weight]) in (
        "values: 1 of 864 numbers differ", "values: 1 of 2048 numbers differ",
    )  # fmt: skip
    others = program.encoded.keys() - {weight}
    assert {same_numbers(program.encoded[name], found[name]) for name in others} == {""}


def damage(path: Path, kind: str, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if kind == "cut":
        del data[generator.randrange(len(data)) :]
    elif kind == "flip":
        for _ in range(8):
            data[generator.randrange(len(data))] ^= generator.randrange(1, 256)
    else:
        data.clear()
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["cut", "flip", "empty"])
@pytest.mark.parametrize("seed", range(4))
def test_damage_is_one_kind_of_error(kind, seed, copied) -> None:
    damage(copied.path / "main.mlirb", kind, random.Random(seed))
    with pytest.raises(ArtifactError, match=r"main\.mlirb"):
        RUNTIME.open(copied)
    with pytest.raises(ArtifactError):
        RUNTIME.read_weights(copied)


def test_the_bytecode_reader_on_damaged_files(copied) -> None:
    file = copied.path / "main.mlirb"
    whole = file.read_bytes()
    names = set(named_blobs(file))
    assert {"stem.weight", "stem.weight.scale", "first.weight"} <= names
    refused = 0
    for seed in range(60):
        file.write_bytes(whole)
        damage(file, "cut" if seed % 2 else "flip", random.Random(seed))
        try:
            named_blobs(file)
        except ArtifactError:
            refused += 1
    assert refused > 25


@pytest.mark.parametrize("name", ["main.hash", "main.mlirb", "metadata.json"])
def test_a_missing_file(name, copied) -> None:
    (copied.path / name).unlink()
    with pytest.raises(ArtifactError):
        RUNTIME.open(copied)


def test_metadata_that_is_no_metadata(copied) -> None:
    (copied.path / "metadata.json").write_text("[1")
    with pytest.raises(ArtifactError):
        RUNTIME.open(copied)


def test_another_models_signature_and_placements(artifact) -> None:
    inputs = (artifact.signature.inputs[0],)
    with pytest.raises(ArtifactError, match="takes ids, x, not x"):
        RUNTIME.open(replace(artifact, signature=replace(artifact.signature, inputs=inputs)))
    with pytest.raises(ArtifactError, match="does not hold head"):
        RUNTIME.read_weights(replace(artifact, placements=(Placement("head", "nowhere"),)))


def test_what_it_holds() -> None:
    assert RUNTIME.holds("conv", Affine(4), "float") == ""
    assert RUNTIME.holds("linear", Affine(), "int8") == ""
    assert RUNTIME.holds("other", Float(16), "float") == ""
    assert "int16" in RUNTIME.holds("linear", Affine(), "int16")
    assert "dynamic" in RUNTIME.holds("linear", Affine(), "dynamic")
    assert "only the weights of layers" in RUNTIME.holds("other", Affine(), "float")


def test_floats_read_back_as_stored(artifact) -> None:
    found = RUNTIME.read_weights(artifact)
    assert isinstance(found["second.weight"], FloatTensor)
    assert found["second.weight"].values.dtype == np.float16
