from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import onnx
import pytest

from edgeship.compression.affine import quantize_nearest
from edgeship.core.model import TensorSpec
from edgeship.core.weights import Affine, Float, Palette, Sparse, same_numbers
from edgeship.errors import ArtifactError, DataError, EncodingError
from edgeship.runtimes.onnxruntime import RUNTIME

GROUP = Affine(4, granularity="group", group_size=32)


@pytest.fixture(scope="module")
def artifact(layers_program, with_encoded, lower_to_onnx):
    names = ("first.weight", "words.weight", "depthwise.weight")
    encoded = {name: quantize_nearest(layers_program.weight(name), Affine(8)) for name in names}
    return lower_to_onnx(with_encoded(layers_program, encoded))


def _inputs(artifact):
    return {spec.name: np.ones(spec.shape, spec.numpy_dtype) for spec in artifact.signature.inputs}


@pytest.mark.parametrize(
    ("op", "encoding", "activations", "reason"),
    [
        ("linear", Affine(8), "float", ""),
        ("linear", GROUP, "dynamic", ""),
        ("linear", replace(GROUP, symmetric=False), "float", ""),
        ("embedding", GROUP, "float", ""),
        ("depthwise_conv", Affine(4), "int16", ""),
        ("conv", Affine(2), "float", ""),
        ("other", Float(16), "int8", ""),
        ("conv", GROUP, "float", "linear layers and embeddings"),
        ("linear", Affine(8, symmetric=False), "int8", "zero point"),
        ("linear", Affine(2), "int8", "2-bit"),
        ("linear", Affine(3), "float", ""),
        ("linear", Palette(4), "float", "widened"),
        ("linear", Sparse(Float(16)), "float", "widened"),
        ("other", Affine(8), "float", "only weights"),
    ],
)
def test_the_matrix_says_why_not(op, encoding, activations, reason):
    found = RUNTIME.holds(op, encoding, activations)
    assert reason in found
    assert bool(found) == bool(reason)


def test_require_raises_with_the_reason():
    with pytest.raises(EncodingError, match="widened"):
        RUNTIME.require("linear", Palette(4), "float")


def test_memory_is_counted_as_it_is_while_running():
    assert RUNTIME.resident_bits("linear", Float(16), "float") == 32
    assert RUNTIME.resident_bits("linear", Affine(8), "float") == 32
    assert RUNTIME.resident_bits("linear", Affine(8), "dynamic") == 8
    assert RUNTIME.resident_bits("linear", Affine(8), "int8") == 8
    assert RUNTIME.resident_bits("linear", GROUP, "float") == 4
    assert RUNTIME.resident_bits("embedding", Affine(8), "float") == 8
    assert RUNTIME.container_bits("linear", Affine(3)) == RUNTIME.resident_bits("linear", Affine(3), "float") == 4


def test_a_wrong_input_is_named(artifact):
    with RUNTIME.open(artifact) as session:
        with pytest.raises(DataError, match="ids is missing"):
            session.run({"x": _inputs(artifact)["x"]})
        with pytest.raises(DataError, match="x has shape"):
            session.run({**_inputs(artifact), "x": np.ones((1, 3, 8, 8), np.float32)})


def test_a_signature_that_is_not_the_files_is_refused(artifact):
    other = replace(artifact.signature, inputs=(TensorSpec("y", "f32", (1,)), *artifact.signature.inputs[1:]))
    with pytest.raises(ArtifactError, match="not those of its signature"):
        RUNTIME.open(replace(artifact, signature=other))


def test_a_file_that_is_not_there(artifact, tmp_path):
    gone = replace(artifact, path=tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match="does not exist"):
        RUNTIME.open(gone)
    with pytest.raises(ArtifactError):
        RUNTIME.read_weights(gone)


def test_a_weight_that_is_not_in_the_file(artifact):
    (first, *rest) = artifact.placements
    with pytest.raises(ArtifactError, match="no tensor elsewhere"):
        RUNTIME.read_weights(replace(artifact, placements=(replace(first, stored="elsewhere"), *rest)))


@pytest.mark.parametrize("weight", ["first.weight", "words.weight", "depthwise.weight"])
@pytest.mark.parametrize("role", ["q", "scale"])
def test_reading_back_sees_one_changed_number(artifact, layers_program, tmp_path, weight, role):
    decided = quantize_nearest(layers_program.weight(weight), Affine(8))
    model = onnx.load(artifact.path)
    for tensor in model.graph.initializer:
        if tensor.name == f"{weight}_{role}":
            array = onnx.numpy_helper.to_array(tensor).copy()
            array.reshape(-1)[3] += 1
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "changed.onnx")
    found = RUNTIME.read_weights(replace(artifact, path=tmp_path / "changed.onnx"))[weight]
    assert "1 of" in same_numbers(decided, found)
    assert same_numbers(decided, RUNTIME.read_weights(artifact)[weight]) == ""


def test_reading_back_follows_the_graph_and_not_names(artifact, tmp_path):
    model = onnx.load(artifact.path)
    for node in model.graph.node:
        if node.op_type == "Cast":
            node.op_type = "Identity"
            del node.attribute[:]
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(ArtifactError, match="dequantizes"):
        RUNTIME.read_weights(replace(artifact, path=tmp_path / "changed.onnx"))


def test_damaged_files_give_artifact_errors_and_nothing_else(artifact, tmp_path):
    """Truncated and scrambled files: every answer is a result or an `ArtifactError`."""
    chance = random.Random(7)
    data = artifact.path.read_bytes()
    bad = tmp_path / "bad.onnx"
    refused = 0
    for turn in range(60):
        changed = bytearray(data)
        if turn % 3 == 0:
            changed = changed[: chance.randrange(len(changed))]
        else:
            for _ in range(chance.choice([1, 3, 20])):
                changed[chance.randrange(len(changed) if turn % 3 == 1 else 9000)] = chance.randrange(256)
        bad.write_bytes(changed)
        damaged = replace(artifact, path=bad)
        for attempt in (RUNTIME.read_weights, lambda model: RUNTIME.open(model).run(_inputs(model))):
            try:
                attempt(damaged)
            except ArtifactError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 40


def test_it_needs_its_packages(monkeypatch, artifact):
    from edgeship.errors import MissingToolError

    monkeypatch.setattr(type(RUNTIME), "packages", ("onnxruntime", "no-such-package"))
    with pytest.raises(MissingToolError, match=r"ONNX Runtime needs no-such-package.*edgeship\[onnx\]"):
        RUNTIME.open(artifact)
