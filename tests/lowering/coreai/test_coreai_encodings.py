"""Every (operator, encoding) that Core AI is said to hold: read back bit for bit, and computed as the reference says."""

import hashlib

import pytest
import torch

from edgeship.core.model import TensorSpec
from edgeship.core.weights import Affine, Float, Palette, Sparse
from edgeship.errors import EncodingError
from edgeship.passes.lower.torch_to_coreai import TorchToCoreAI
from edgeship.program.export import make_program
from edgeship.runtimes.coreai.runtime import RUNTIME

FAMILIES = ("integers_0", "integers_1", "integers_2", "integers_3", "palettes", "sparse_0", "sparse_1")


def held(op, encoding) -> str:
    return RUNTIME.holds(op, encoding, "float")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell(family, lower, apple) -> None:
    program = apple.cells_program(apple.FAMILIES[family], held)
    apple.check(RUNTIME, lower, program, TorchToCoreAI("float16"), 55)


def test_in_float32(lower, apple) -> None:
    apple.check(RUNTIME, lower, apple.cells_program(apple.EXACT, held), TorchToCoreAI("float32"), 110)


def test_all_families_are_tested(apple) -> None:
    assert set(FAMILIES) == set(apple.FAMILIES)
    for op in ("linear", "conv", "embedding"):
        assert not any(held(op, encoding) for family in apple.FAMILIES.values() for encoding in family)
    refused = {held("conv_transpose", encoding) for family in apple.FAMILIES.values() for encoding in family}
    assert refused == {
        "",
        "groups of input channels exist for linear layers, convolutions and embeddings; use scales per channel",
    }


def test_three_bits_stand_in_four() -> None:
    assert RUNTIME.container_bits("linear", Affine(3)) == 4
    assert RUNTIME.container_bits("linear", Sparse(Affine(3))) == 4
    assert RUNTIME.container_bits("linear", Palette(3)) == 3


def test_sparse_floats_are_of_the_programs_width(lower, apple) -> None:
    program = apple.cells_program([Sparse(Float(16))], held)
    with pytest.raises(EncodingError, match="as sparse float16 in a float32 program"):
        lower(program, TorchToCoreAI("float32"))


def test_a_weight_of_zeros_alone(with_encoded, layers_program, lower, apple) -> None:
    tensor = apple.decide(torch.zeros(64, 32), Sparse(Float(16)))
    tensor.mask[:] = False
    with pytest.raises(EncodingError, match=r"first\.weight is all zeros"):
        lower(with_encoded(layers_program, {"first.weight": tensor}), TorchToCoreAI())


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
        Sparse(Affine(2)),
        Sparse(Palette(4, 8)),
        Palette(1),
        Palette(3),
        Palette(6, 8),
        Affine(2, True, "group", 64),
    ],
    ids=str,
)
def test_a_large_weight_takes_the_bytes_it_says(encoding, with_encoded, lower, apple) -> None:
    program, tensor = large(apple, encoding)
    artifact = lower(with_encoded(program, {"weight": tensor}), TorchToCoreAI())
    # Beside the weight and its bias, the graph takes some kilobytes.
    extra = (artifact.path / "main.mlirb").stat().st_size - tensor.stored_bytes - 2 * 256
    assert 0 < extra < 6000
    found = RUNTIME.read_weights(artifact)["weight"]
    if isinstance(encoding, Sparse):
        assert tensor.sparsity == found.sparsity == 0.5


@pytest.mark.parametrize("encoding", [Sparse(Float(16)), Sparse(Affine(4)), Palette(6, 8)], ids=str)
def test_one_changed_bit_is_another_weight(encoding, with_encoded, lower, apple) -> None:
    program, tensor = large(apple, encoding)
    program = with_encoded(program, {"weight": tensor})
    artifact = lower(program, TorchToCoreAI())
    file = artifact.path / "main.mlirb"
    data = apple.damaged(file.read_bytes(), file.stat().st_size // 2)
    file.write_bytes(data)
    # Whoever changes the digest too still changes the numbers that are read.
    (artifact.path / "main.hash").write_bytes(hashlib.sha256(data).digest())
    assert set(apple.unequal(RUNTIME, artifact, program)) == {"weight"}
