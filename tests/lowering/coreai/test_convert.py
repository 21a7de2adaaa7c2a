"""Exact storage in Core AI: what is read back from the saved asset is what was decided, and it computes so."""

import numpy as np
import pytest
import torch

from edgeship.compat import coreai as compat
from edgeship.core.model import TensorSpec
from edgeship.core.weights import Affine, Float, same_numbers
from edgeship.errors import EncodingError
from edgeship.lowering.coreai.constants import pack
from edgeship.passes.lower.torch_to_coreai import TorchToCoreAI
from edgeship.program.export import make_program
from edgeship.runtimes.coreai.runtime import RUNTIME

CASES = [
    ("float16", Float(16)),
    ("float16", Affine()),
    ("float16", Affine(4, True, "group", 32)),
    ("float32", Affine(8, False)),
    ("float32", Affine(8, True, "tensor")),
    ("float32", Affine(4)),
    ("float32", Affine(4, False, "group", 32)),
    ("float32", Affine(2)),
    ("float32", Affine(2, False)),
]


@pytest.mark.parametrize(("compute", "encoding"), CASES, ids=lambda value: str(value).replace(" ", "_"))
def test_every_layer_reads_back_equal(compute, encoding, layers_program, with_encoded, lower, apple) -> None:
    program = with_encoded(layers_program, apple.decide_all(layers_program, encoding))
    artifact = lower(program, TorchToCoreAI(compute))
    found = RUNTIME.read_weights(artifact)
    assert found.keys() == program.encoded.keys()
    assert {name: same_numbers(tensor, found[name]) for name, tensor in program.encoded.items()} == dict.fromkeys(
        found, ""
    )
    if isinstance(encoding, Affine):
        assert {tensor.encoding.bits for tensor in found.values()} == {encoding.bits}
    assert apple.decibels(RUNTIME, artifact, program) > (50 if compute == "float16" else 110)


def test_floats_of_another_width_are_refused(layers_program, with_encoded, lower, apple) -> None:
    program = with_encoded(layers_program, apple.decide_all(layers_program, Float(16)))
    with pytest.raises(EncodingError, match=r"Core AI .*as float16 in a float32"):
        lower(program, TorchToCoreAI("float32"))


def test_packing_is_lowest_bits_first() -> None:
    assert pack(np.array([1, -2, 7], np.int8), 4).tolist() == [0xE1, 0x07]
    assert pack(np.array([[1, -1], [0, -2], [1, 0]], np.int8), 2).tolist() == [0b10001101, 0b0001]
    assert pack(np.array([-1, 5], np.int8), 8).tolist() == [255, 5]
    assert pack(np.array([1, 2, 63], np.uint8), 6).tolist() == [0b10000001, 0b11110000, 0b11]
    assert pack(np.array([7, 0, 1], np.uint8), 3).tolist() == [0b01000111, 0, 0]
    assert pack(np.array([1, 0, 1], np.uint8), 1).tolist() == [5]


def test_tied_weights_are_stored_once(layers_program, with_encoded, lower, apple) -> None:
    program = with_encoded(layers_program, apple.decide_all(layers_program, Affine()))
    artifact = lower(program, TorchToCoreAI())
    places = [placement.stored for placement in artifact.placements]
    assert places.count("words.weight") == 1
    assert len(set(places)) == len(places)


def test_the_same_bytes(layers_program, with_encoded, lower, apple, tmp_path) -> None:
    program = with_encoded(layers_program, apple.decide_all(layers_program, Affine(4)))
    first = lower(program, TorchToCoreAI())
    assert "nondeterministic" not in first.facts
    program.save(tmp_path / "program")
    assert apple.digests(first.path.parent) == apple.elsewhere(
        tmp_path / "program", tmp_path / "out", "coreai", "TorchToCoreAI"
    )


@pytest.mark.parametrize(("most_bytes", "said"), [(compat.MOST_BYTES, ""), (100, "draws the names of 2 constants")])
def test_what_differs_from_build_to_build_is_said(most_bytes, said, lower, monkeypatch) -> None:
    """Floats in their own width are constants without a name; they get one by their content up to a size."""
    monkeypatch.setattr(compat, "MOST_BYTES", most_bytes)
    program = make_program(torch.nn.Linear(2, 2000), [TensorSpec("x", "f32", (1, 2))], [torch.ones(1, 2)])
    artifact = lower(program, TorchToCoreAI("float32"))
    assert said in artifact.facts.get("nondeterministic", "")
    assert bool(said) == ("nondeterministic" in artifact.facts)
