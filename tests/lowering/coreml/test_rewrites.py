"""Operators that coremltools lacks: rewritten they compute what torch computes; what is left is refused by name."""

import pytest
import torch
from torch.nn import functional

from edgeship.core.model import TensorSpec
from edgeship.errors import UnsupportedOpError
from edgeship.passes.lower.torch_to_coreml import TorchToCoreML
from edgeship.program.export import make_program
from edgeship.runtimes.coreml.runtime import RUNTIME

HEADS = (1, 2, 8, 4)
LOWEST = torch.finfo(torch.float32).min
CASES = {
    "new_ones": (lambda x: x * x.new_ones((3, 8)).cumsum(0), [(3, 8)], None),
    "and_of_masks": (lambda x, ids: torch.where((ids > 2) & (ids < 7), x, -x), [(1, 8)], (1, 8)),
    "or_of_masks": (lambda x, ids: torch.where(~(ids > 2) | (ids == 5), x, -x), [(1, 8)], (1, 8)),
    "index_copy": (lambda x, y: x.index_copy(1, torch.tensor([2, 5]), y), [(1, 8, 4), (1, 2, 4)], None),
    "prod": (lambda x: x.prod(1, keepdim=True), [(2, 5)], None),
    "attention": (lambda x: functional.scaled_dot_product_attention(x, x * 2, x + 1), [HEADS], None),
    "causal": (lambda x: functional.scaled_dot_product_attention(x, x * 2, x + 1, is_causal=True), [HEADS], None),
    "scaled": (lambda x: functional.scaled_dot_product_attention(x, x * 2, x + 1, scale=0.3), [HEADS], None),
    "grouped_heads": (
        lambda x: functional.scaled_dot_product_attention(x, x[:, :1] * 2, x[:, :1] + 1, enable_gqa=True),
        [(1, 4, 8, 4)],
        None,
    ),
    "bool_mask": (
        lambda x, ids: functional.scaled_dot_product_attention(
            x, x * 2, x + 1, attn_mask=(ids[:, None, None, :] > 4) | (torch.arange(8) == 0)
        ),
        [HEADS],
        (1, 8),
    ),
    "lowest_fill": (lambda x, ids: torch.softmax(x.masked_fill((ids > 4)[:, None], LOWEST), -1), [(1, 3, 8)], (1, 8)),
    "infinite_fill": (
        lambda x, ids: torch.softmax(torch.where((ids > 8)[:, None], float("-inf"), x), -1), [(1, 3, 8)], (1, 8),
    ),
    "index": (lambda x, ids: x[torch.arange(1), ids[:, 0]], [(1, 10, 4)], (1, 3)),
    "shortcut": (lambda x: functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)), [(1, 3, 8, 8)], None),
    "resize": (lambda x: functional.interpolate(x, (9, 5), mode="bilinear", align_corners=True), [(1, 3, 7, 9)], None),
    "six_axes": (
        lambda x: x.reshape(1, 2, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 8, 4) * 2, [(1, 8, 4)], None,
    ),
    # The stride is left to torch.
    "pools": (lambda x: (functional.max_pool2d(x, 2), functional.avg_pool2d(x, 2)), [(1, 3, 8, 8)], None),
    "pools_of_one_axis": (lambda x: (functional.max_pool1d(x, 2), functional.avg_pool1d(x, 2)), [(1, 3, 8)], None),
    "same_output_twice": (lambda x: (x * 2, x, (y := x * 3), y), [(2, 8)], None),
    "one_input_unused": (lambda x, y: x * 2, [(2, 8), (3,)], None),
    "integer_output": (lambda x, ids: (x.argmax(-1), ids * 2 + 1, x > 0), [(2, 8)], (1, 5)),
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(lower, apple) -> dict[str, float]:
    """Decibels by output of all cases in one program."""
    program = apple.program_of_all(CASES)
    artifact = lower(program, TorchToCoreML("iOS17"))
    assert [spec.name for spec in artifact.signature.outputs] == [spec.name for spec in program.signature.outputs]
    assert {spec.dtype for spec in (*artifact.signature.inputs, *artifact.signature.outputs)} <= {"f32", "i32"}
    return apple.decibels_by_output(RUNTIME, artifact, program)


@pytest.mark.parametrize("name", CASES)
def test_computes_what_torch_computes(name, measured) -> None:
    found = {output: ratio for output, ratio in measured.items() if output.rstrip("_0123456789") == name}
    assert found
    assert min(found.values()) > 55, found


class Model(torch.nn.Module):
    """Something that cannot be lowered, two levels down."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(8, 8), Bits())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


class Bits(torch.nn.Module):
    """Integer arithmetic that Core ML has no operator for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + ((x * 4).to(torch.int32) & 3)


class Leaky(torch.nn.Module):
    """Leaky ReLUs with slopes of their own, and one with slopes that are computed."""

    def __init__(self, slopes: list[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.slopes = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(count)) for count in slopes])

    def forward(self, slope: torch.Tensor, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = [functional.prelu(x, own) for x, own in zip(xs, self.slopes, strict=True)]
        return (*found, *(functional.prelu(x, 0.5 * slope) for x in xs if x.dim() > 1))


def test_slopes_of_a_leaky_relu_for_every_rank(lower, apple) -> None:
    """Core ML's own operator takes one slope, or one for each channel of an image."""
    shapes = [(4, 6, 3, 5, 2)[:rank] for rank in range(1, 6) for _ in range(1 if rank == 1 else 2)]
    # One slope for all, and one a channel.
    model = Leaky([1] + [1, 6] * 4)
    specs = [TensorSpec("slope", "f32", (6,)), *(TensorSpec(f"x{n}", "f32", shape) for n, shape in enumerate(shapes))]
    program = make_program(model, specs, [torch.randn(spec.shape) for spec in specs])
    artifact = lower(program, TorchToCoreML("iOS17"))
    found = apple.decibels_by_output(RUNTIME, artifact, program)
    assert len(found) == 17
    assert min(found.values()) > 60, found


def test_an_operator_without_lowering_is_named_with_its_place(lower, apple) -> None:
    program = apple.program_of(Model(), (1, 8))
    with pytest.raises(UnsupportedOpError, match=r"Core ML.*aten.*and.* at encoder\.1; rewrite that layer"):
        lower(program, TorchToCoreML("iOS17"))


def test_a_converter_that_fails_names_the_operator(lower, apple, monkeypatch) -> None:
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    def fails(context, node):
        raise NotImplementedError("Only supports small angles")

    monkeypatch.setitem(_TORCH_OPS_REGISTRY.name_to_func_mapping, "sin", fails)
    program = apple.program_of(lambda x: torch.sin(x * 2), (1, 8))
    with pytest.raises(UnsupportedOpError, match=r"cannot lower aten.sin.default at node sin: Only supports small"):
        lower(program, TorchToCoreML("iOS17"))
