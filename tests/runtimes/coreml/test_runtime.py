"""The Core ML plug-in: sessions, weights from the package, and damage of every kind."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeship.compression.affine import quantize_nearest, to_float16
from edgeship.core.model import CoreMLModel, Placement
from edgeship.core.weights import Affine, Float, same_numbers
from edgeship.errors import ArtifactError, DataError, EdgeshipError
from edgeship.passes.lower.torch_to_coreml import TorchToCoreML
from edgeship.runtimes.coreml.runtime import ON_MAC, RUNTIME
from edgeship.runtimes.coreml.storage import RECORD_BYTES

INPUTS = {
    "x": np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32),
    "ids": np.array([[3, 1, 39, 0, 7]]),
}
INSIDE = Path("Data/com.apple.CoreML")


@pytest.fixture(scope="module")
def program(layers_program, with_encoded):
    weights = layers_program.weights
    return with_encoded(
        layers_program,
        {
            "stem.weight": quantize_nearest(weights["stem.weight"], Affine()),
            "first.weight": quantize_nearest(weights["first.weight"], Affine(4)),
            "second.weight": to_float16(weights["second.weight"]),
        },
    )


@pytest.fixture(scope="module")
def artifact(program, lower) -> CoreMLModel:
    return lower(program, TorchToCoreML("iOS18"))


@pytest.fixture
def copied(artifact, tmp_path) -> CoreMLModel:
    """A copy to damage."""
    shutil.copytree(artifact.path, tmp_path / "model.mlpackage")
    return replace(artifact, path=tmp_path / "model.mlpackage")


def test_a_session_answers_with_the_signature(artifact, program) -> None:
    assert [spec.dtype for spec in artifact.signature.inputs] == ["f32", "i32"]
    with RUNTIME.open(artifact) as session:
        found = session.run(INPUTS)
    wanted = program.module()(torch.from_numpy(INPUTS["x"]), torch.from_numpy(INPUTS["ids"]))
    assert list(found) == ["image", "text"]
    for name, reference in zip(found, wanted, strict=True):
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], reference.detach().numpy(), atol=0.01 * float(reference.abs().max()))


def test_what_is_wrong_with_inputs(artifact) -> None:
    with RUNTIME.open(artifact) as session:
        with pytest.raises(DataError, match="input ids is missing"):
            session.run({"x": INPUTS["x"]})
        with pytest.raises(DataError, match=r"x has the shape \(1, 3, 8, 8\)"):
            session.run({**INPUTS, "x": INPUTS["x"][:, :, :8, :8]})
        with pytest.raises(EdgeshipError, match="do not fit int32"):
            session.run({**INPUTS, "ids": INPUTS["ids"] + 2**40})


def test_weights_come_back_equal(artifact, program) -> None:
    found = RUNTIME.read_weights(artifact)
    assert {name: same_numbers(tensor, found[name]) for name, tensor in program.encoded.items()} == dict.fromkeys(
        found, ""
    )


def test_one_changed_bit_is_another_weight(copied, program) -> None:
    file = copied.path / INSIDE / "weights/weight.bin"
    data = bytearray(file.read_bytes())
    start = data.find(program.encoded["stem.weight"].values.tobytes())
    assert start > RECORD_BYTES
    data[start + 5] ^= 1
    file.write_bytes(data)
    found = RUNTIME.read_weights(copied)
    assert same_numbers(program.encoded["stem.weight"], found["stem.weight"]) == "values: 1 of 864 numbers differ"
    assert same_numbers(program.encoded["first.weight"], found["first.weight"]) == ""


@pytest.mark.parametrize("name", ["model.mlmodel", "weights/weight.bin"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_file_cut_short(name, share, copied) -> None:
    file = copied.path / INSIDE / name
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ArtifactError):
        RUNTIME.open(copied)
    with pytest.raises(ArtifactError):
        RUNTIME.read_weights(copied)


def test_changed_bytes_end_in_our_errors_only(copied) -> None:
    file = copied.path / INSIDE / "model.mlmodel"
    whole = file.read_bytes()
    refused = 0
    for seed in range(40):
        generator = random.Random(seed)
        data = bytearray(whole)
        for _ in range(6):
            data[generator.randrange(len(data))] ^= generator.randrange(1, 256)
        file.write_bytes(data)
        for step in (RUNTIME.read_weights, lambda damaged: RUNTIME.open(damaged).run(INPUTS)):
            try:
                step(copied)
            except EdgeshipError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 20


def test_a_manifest_that_is_no_manifest(copied) -> None:
    (copied.path / "Manifest.json").write_text("[1")
    with pytest.raises(ArtifactError, match="Manifest"):
        RUNTIME.open(copied)


def test_a_manifest_that_leads_outside(copied) -> None:
    manifest = json.loads((copied.path / "Manifest.json").read_text())
    for item in manifest["itemInfoEntries"].values():
        item["path"] = "../../../" + item["path"]
    (copied.path / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError):
        RUNTIME.open(copied)


def test_another_models_signature_and_placements(artifact) -> None:
    outputs = (artifact.signature.outputs[0],)
    with pytest.raises(ArtifactError, match="gives image, text, not image"):
        RUNTIME.open(replace(artifact, signature=replace(artifact.signature, outputs=outputs)))
    with pytest.raises(ArtifactError, match="does not hold head"):
        RUNTIME.read_weights(replace(artifact, placements=(Placement("head", "nowhere"),)))


def test_what_it_holds_and_what_it_is() -> None:
    assert RUNTIME.holds("conv", Affine(4), "float") == ""
    assert RUNTIME.holds("linear", Affine(3), "int8") == ""
    assert RUNTIME.holds("other", Float(16), "float") == ""
    assert "int8 only" in RUNTIME.holds("linear", Affine(), "int16")
    assert "dynamic" in RUNTIME.holds("linear", Affine(), "dynamic")
    assert "only the weights of layers" in RUNTIME.holds("other", Affine(), "float")
    assert (RUNTIME.engine.execution == "native") is ON_MAC
    assert bool(RUNTIME.engine.untimed) is not ON_MAC
