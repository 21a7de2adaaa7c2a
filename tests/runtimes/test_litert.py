from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from edgeship.compression.affine import quantize_nearest
from edgeship.core.weights import Affine, Float, Palette, Sparse, same_numbers
from edgeship.errors import ArtifactError, DataError, EncodingError
from edgeship.runtimes.litert.runtime import RUNTIME

GROUP = Affine(4, granularity="group", group_size=32)


@pytest.fixture(scope="module")
def artifact(layers_program, with_encoded, lower_to_tflite):
    names = ("first.weight", "words.weight", "depthwise.weight")
    encoded = {name: quantize_nearest(layers_program.weight(name), Affine(8)) for name in names}
    return lower_to_tflite(with_encoded(layers_program, encoded))


def _inputs(artifact):
    return {spec.name: np.ones(spec.shape, spec.numpy_dtype) for spec in artifact.signature.inputs}


@pytest.mark.parametrize(
    ("op", "encoding", "activations", "reason"),
    [
        ("linear", Affine(8), "float", ""),
        ("depthwise_conv", Affine(4), "dynamic", ""),
        ("embedding", GROUP, "float", ""),
        ("linear", GROUP, "dynamic", ""),
        ("other", Float(16), "float", ""),
        ("linear", GROUP, "float", "dynamic activations"),
        ("conv", GROUP, "dynamic", "linear layers and embeddings"),
        ("linear", Affine(2, granularity="group", group_size=32), "dynamic", "wrongly"),
        ("linear", Affine(4, granularity="group", group_size=48), "dynamic", "group sizes"),
        ("linear", Affine(8, symmetric=False), "float", "zero points"),
        ("linear", Affine(3), "float", ""),
        ("depthwise_conv", Affine(3), "int16", "answer wrongly"),
        ("linear", Palette(4), "float", "no palettes"),
        ("conv", Sparse(Affine(8)), "float", "unpacked at load"),
        ("other", Float(32), "int8", "on a grid like theirs"),
        ("other", Affine(8), "float", "only weights"),
        ("linear", Affine(8), "int8", ""),
        ("conv", Affine(4), "int16", ""),
        ("depthwise_conv", Affine(4), "int16", "answer wrongly"),
        ("linear", GROUP, "int8", "no groups"),
        ("conv", Affine(2), "int8", "8 and 4 bits"),
        ("embedding", GROUP, "int8", ""),
    ],
)
def test_the_matrix_says_why_not(op, encoding, activations, reason):
    found = RUNTIME.holds(op, encoding, activations)
    assert reason in found
    assert bool(found) == bool(reason)


def test_require_raises_with_the_reason():
    with pytest.raises(EncodingError, match="zero points"):
        RUNTIME.require("linear", Affine(4, symmetric=False), "float")


def test_a_wrong_input_is_named(artifact):
    with RUNTIME.open(artifact) as session:
        with pytest.raises(DataError, match="ids is missing"):
            session.run({"x": np.ones((1, 3, 16, 16), np.float32)})
        with pytest.raises(DataError, match=r"x has shape \[1, 3, 8, 8\]"):
            session.run({**_inputs(artifact), "x": np.ones((1, 3, 8, 8), np.float32)})


def test_int64_ids_are_taken_when_they_fit(artifact):
    inputs = _inputs(artifact)
    with RUNTIME.open(artifact) as session:
        want = session.run(inputs)
        have = session.run({**inputs, "ids": inputs["ids"].astype(np.int64)})
    assert np.array_equal(want["text"], have["text"])


def test_a_changed_integer_is_found(artifact, tmp_path):
    before = RUNTIME.read_weights(artifact)["first.weight"]
    content = bytearray(artifact.path.read_bytes())
    place = content.find(before.values.tobytes())
    assert place > 0
    content[place + 5] ^= 1
    (tmp_path / "model.tflite").write_bytes(content)
    after = RUNTIME.read_weights(replace(artifact, path=tmp_path / "model.tflite"))
    assert "1 of" in same_numbers(before, after["first.weight"])


def test_a_missing_file_and_a_stranger_are_refused(artifact, tmp_path):
    with pytest.raises(ArtifactError, match="missing"):
        RUNTIME.open(replace(artifact, path=tmp_path / "none.tflite"))
    for content in (b"", b"TFL3", b"PK\3\4" + bytes(100)):
        (tmp_path / "odd.tflite").write_bytes(content)
        with pytest.raises(ArtifactError):
            RUNTIME.open(replace(artifact, path=tmp_path / "odd.tflite"))


def test_every_truncation_is_refused(artifact, tmp_path):
    content, path = artifact.path.read_bytes(), tmp_path / "model.tflite"
    for length in np.linspace(0, len(content) - 20, 40).astype(int):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError):
            RUNTIME.open(replace(artifact, path=path))
        with pytest.raises(ArtifactError):
            RUNTIME.read_weights(replace(artifact, path=path))


def test_damage_never_reaches_the_interpreter_as_a_crash(artifact, tmp_path):
    """The interpreter would end this very process; reading wrong numbers is the digest's business, not the reader's."""
    content, path, draw = artifact.path.read_bytes(), tmp_path / "model.tflite", random.Random(7)
    refused = 0
    for _ in range(120):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 4, 16))):
            # The tables lie outside the weights: at the front, and at the end behind the last of them.
            place = draw.choice((draw.randrange(400), draw.randrange(len(content) - 12000, len(content))))
            damaged[place] = draw.choice((0, 128, 255))
        path.write_bytes(damaged)
        try:
            RUNTIME.read_weights(replace(artifact, path=path))
            with RUNTIME.open(replace(artifact, path=path)):
                pass
        except ArtifactError:
            refused += 1
    assert refused > 30


def test_other_names_than_recorded_are_refused(artifact):
    signature = replace(artifact.signature, outputs=artifact.signature.outputs[:1])
    with pytest.raises(ArtifactError, match="other inputs or outputs"):
        RUNTIME.open(replace(artifact, signature=signature))


@pytest.mark.parametrize(
    ("op", "encoding", "activations", "bits"),
    [
        ("linear", Affine(8), "float", 32),
        ("linear", Affine(4), "dynamic", 4),
        ("linear", Affine(3), "dynamic", 4),
        ("embedding", Affine(8), "float", 8),
        ("conv", Affine(8), "dynamic", 8),
        ("conv", Affine(4), "dynamic", 32),
        ("depthwise_conv", Affine(8), "dynamic", 32),
        ("conv", Affine(4, granularity="tensor"), "dynamic", 32),
        ("depthwise_conv", Affine(4), "dynamic", 32),
        ("conv_transpose", Affine(4), "int8", 32),
        ("conv", Affine(8), "int16", 8),
        ("linear", Float(16), "float", 32),
    ],
)
def test_memory_is_counted_as_it_is_while_running(op, encoding, activations, bits):
    assert RUNTIME.resident_bits(op, encoding, activations) == bits
