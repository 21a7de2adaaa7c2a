"""Every (operator, encoding) that Core ML is said to hold: read back bit for bit, and computed as the reference says."""

import pytest
import torch

from edgeship.core.model import TensorSpec
from edgeship.core.weights import Affine, Float, Palette, Sparse
from edgeship.errors import EncodingError
from edgeship.passes.lower.torch_to_coreml import TorchToCoreML
from edgeship.program.export import make_program
from edgeship.runtimes.coreml.forms import lacking
from edgeship.runtimes.coreml.runtime import RUNTIME

FAMILIES = ("integers_0", "integers_1", "integers_2", "integers_3", "palettes", "sparse_0", "sparse_1")
# Before iOS 18: per tensor, and indices and masks that we pack.
OLD = [
    Float(16),
    Affine(8, True, "tensor"),
    Affine(),
    Affine(8, False),
    *(Palette(bits) for bits in (1, 2, 4, 6, 8)),
    Sparse(Float(16)),
]


def held(op, encoding) -> str:
    return RUNTIME.holds(op, encoding, "float")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell(family, lower, apple) -> None:
    program = apple.cells_program(apple.FAMILIES[family], held)
    apple.check(RUNTIME, lower, program, TorchToCoreML("iOS18"), 55)


@pytest.mark.parametrize("target", ["iOS18", "iOS26"])
def test_in_float32(target, lower, apple) -> None:
    apple.check(RUNTIME, lower, apple.cells_program(apple.EXACT, held), TorchToCoreML(target, "float32"), 110)


def test_before_ios18(lower, apple) -> None:
    assert [encoding for encoding in OLD if lacking(encoding, 17)] == []
    apple.check(RUNTIME, lower, apple.cells_program(OLD, held), TorchToCoreML("iOS16"), 55)


def test_all_families_are_tested(apple) -> None:
    assert set(FAMILIES) == set(apple.FAMILIES)
    for op in ("linear", "conv", "embedding"):
        assert not any(held(op, encoding) for family in apple.FAMILIES.values() for encoding in family)
    refused = {held("depthwise_conv", encoding) for family in apple.FAMILIES.values() for encoding in family}
    assert refused == {
        "",
        "groups of input channels exist for linear layers, convolutions and embeddings; use scales per channel",
    }


@pytest.mark.parametrize(
    ("encoding", "has"),
    [
        (Affine(4), "it has int8 per tensor or channel"),
        (Affine(8, True, "group", 32), "it has int8 per tensor or channel"),
        (Palette(3), "it has palettes of 1, 2, 4, 6, 8 bits per tensor"),
        (Palette(4, 8), "it has palettes of 1, 2, 4, 6, 8 bits per tensor"),
        (Sparse(Affine()), "zeros are left out of floats only"),
        (Sparse(Palette(4)), "zeros are left out of floats only"),
    ],
    ids=str,
)
def test_what_an_old_system_cannot_hold(encoding, has, with_encoded, lower, apple) -> None:
    program, tensor = large(apple, encoding)
    wanted = f"Core ML of iOS 17 cannot hold {encoding} for .*{has}.*; use that, or --set .*target=iOS18"
    with pytest.raises(EncodingError, match=wanted):
        lower(with_encoded(program, {"weight": tensor}), TorchToCoreML("iOS17"))


def test_sparse_floats_are_of_the_programs_width(lower, apple) -> None:
    program = apple.cells_program([Sparse(Float(16))], held)
    with pytest.raises(EncodingError, match="as sparse float16 in a float32 program"):
        lower(program, TorchToCoreML("iOS18", "float32"))


def test_a_weight_of_zeros_alone(with_encoded, layers_program, lower, apple) -> None:
    weight = torch.zeros(64, 32)
    tensor = apple.decide(weight, Sparse(Float(16)))
    tensor.mask[:] = False
    with pytest.raises(EncodingError, match=r"first\.weight is all zeros"):
        lower(with_encoded(layers_program, {"first.weight": tensor}), TorchToCoreML("iOS18"))


def large(apple, encoding):
    """131,072 weights: more than float16's largest number, 65,504."""
    torch.manual_seed(0)
    program = make_program(torch.nn.Linear(512, 256), [TensorSpec("x", "f32", (1, 512))], [torch.randn(1, 512)])
    return program, apple.decide(program.weights["weight"], encoding)


@pytest.mark.parametrize(
    "encoding",
    [
        Sparse(Float(16)),
        Sparse(Affine()),
        Sparse(Affine(4, True, "group", 32)),
        Sparse(Palette(4, 8)),
        Palette(1),
        Palette(3),
        Palette(6, 8),
        Affine(4, True, "group", 32),
    ],
    ids=str,
)
def test_a_large_weight_takes_the_bytes_it_says(encoding, with_encoded, lower, apple) -> None:
    """coremltools' own pruning finds nothing to prune in a float16 weight of more than 65,504 elements."""
    program, tensor = large(apple, encoding)
    artifact = lower(with_encoded(program, {"weight": tensor}), TorchToCoreML("iOS18"))
    size = (artifact.path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    bias = 2 * 256
    assert abs(size - tensor.stored_bytes - bias) < 0.02 * tensor.stored_bytes
    found = RUNTIME.read_weights(artifact)["weight"]
    if isinstance(encoding, Sparse):
        assert tensor.sparsity == found.sparsity == 0.5


def test_a_list_of_integers_for_every_channel(with_encoded, lower, apple) -> None:
    program, tensor = large(apple, Affine(3))
    artifact = lower(with_encoded(program, {"weight": tensor}), TorchToCoreML("iOS18"))
    size = (artifact.path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    assert 0 < size - tensor.stored_bytes - 2 * 256 - 8 * 256 < 500


def test_what_stands_in_four_bits() -> None:
    assert RUNTIME.container_bits("depthwise_conv", Affine(3)) == 4
    for encoding in (Affine(3, True, "group", 32), Affine(2, False, "group", 64), Sparse(Affine(2))):
        assert RUNTIME.container_bits("linear", encoding) == 4
    assert [RUNTIME.container_bits("linear", encoding) for encoding in (Affine(3), Affine(2), Palette(3))] == [3, 2, 3]


@pytest.mark.parametrize("encoding", [Sparse(Float(16)), Sparse(Affine(4)), Palette(6, 8)], ids=str)
def test_one_changed_bit_is_another_weight(encoding, with_encoded, lower, apple) -> None:
    program, tensor = large(apple, encoding)
    program = with_encoded(program, {"weight": tensor})
    artifact = lower(program, TorchToCoreML("iOS18"))
    file = artifact.path / "Data/com.apple.CoreML/weights/weight.bin"
    whole = file.read_bytes()
    # Past the largest record's header, wherever that is.
    file.write_bytes(apple.damaged(whole, len(whole) // 2))
    assert set(apple.unequal(RUNTIME, artifact, program)) == {"weight"}
