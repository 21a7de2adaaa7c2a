"""Exact storage in mlprograms: what is read back from the saved package is what was decided, and it computes so."""

import pytest

from edgeship.core.weights import Affine, Float
from edgeship.passes.lower.torch_to_coreml import TorchToCoreML
from edgeship.runtimes.coreml.runtime import RUNTIME

CASES = [
    ("iOS16", Float(16)),
    ("iOS16", Affine()),
    ("iOS17", Affine(8, False)),
    ("iOS16", Affine(8, True, "tensor")),
    ("iOS18", Affine()),
    ("iOS18", Affine(4, True, "group", 32)),
    ("iOS18", Affine(4, False, "group", 32)),
    ("iOS18", Affine(3)),
    ("iOS18", Affine(2, False)),
    ("iOS26", Affine(3)),
]


@pytest.mark.parametrize(("target", "encoding"), CASES, ids=lambda value: str(value).replace(" ", "_"))
def test_every_layer_reads_back_equal(target, encoding, layers_program, with_encoded, lower, apple) -> None:
    program = with_encoded(layers_program, apple.decide_all(layers_program, encoding))
    artifact = lower(program, TorchToCoreML(target))
    assert apple.unequal(RUNTIME, artifact, program) == {}
    assert apple.decibels(RUNTIME, artifact, program) > 50


def test_float32_arithmetic_is_the_reference(layers_program, with_encoded, lower, apple) -> None:
    program = with_encoded(layers_program, apple.decide_all(layers_program, Affine()))
    artifact = lower(program, TorchToCoreML("iOS17", "float32"))
    assert artifact.compute == "f32"
    assert apple.decibels(RUNTIME, artifact, program) > 110


def test_small_files(layers_program, with_encoded, lower, apple) -> None:
    sizes = []
    for encoding in (Float(16), Affine(), Affine(4), Affine(2)):
        program = with_encoded(layers_program, apple.decide_all(layers_program, encoding))
        artifact = lower(program, TorchToCoreML("iOS18"))
        sizes.append((artifact.path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size)
    stored = sum(tensor.values.size for tensor in program.encoded.values())
    assert sizes[0] > 2 * stored
    # Each step halves the integers; scales and floats stay.
    assert sizes[0] - sizes[1] > 0.8 * stored
    assert sizes[1] - sizes[2] > 0.4 * stored
    assert sizes[2] - sizes[3] > 0.15 * stored
