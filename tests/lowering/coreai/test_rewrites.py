"""Operators that coreai-torch lacks or gets wrong: rewritten they compute what torch computes."""

import pytest
import torch
from torch.nn import functional

from edgeship.errors import UnsupportedOpError
from edgeship.passes.lower.torch_to_coreai import TorchToCoreAI
from edgeship.runtimes.coreai.runtime import RUNTIME

HEADS = (1, 2, 8, 4)
CASES = {
    "pool_edges": (lambda x: functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False), [(1, 3, 7, 8)], None),
    "pool_ceil": (lambda x: functional.avg_pool2d(x, 3, 2, 1, ceil_mode=True), [(1, 3, 7, 8)], None),
    "pool_of_one_axis": (lambda x: functional.avg_pool1d(x, 3, 2, 1, count_include_pad=False), [(1, 3, 9)], None),
    "pool_max": (lambda x: functional.adaptive_max_pool2d(x, (1, 1)), [(1, 3, 7, 8)], None),
    "elu": (functional.elu, [(2, 8)], None),
    "variance": (lambda x: x.var(-1) + x.std(-1, correction=0), [(2, 8)], None),
    "remainder": (lambda x, ids: (x.remainder(0.7), ids % 4), [(2, 8)], (2, 8)),
    "sort": (lambda x: x.sort(-1, descending=True), [(2, 8)], None),
    "index_copy": (lambda x, y: x.index_copy(1, torch.tensor([2, 5]), y), [(1, 8, 4), (1, 2, 4)], None),
    "grid_sample": (
        lambda x: functional.grid_sample(x, x.permute(0, 2, 3, 1) * 0.9, align_corners=False), [(1, 2, 5, 5)], None,
    ),
    "lowest_fill": (
        lambda x, ids: torch.softmax(x.masked_fill((ids > 4)[:, None], torch.finfo(torch.float32).min), -1),
        [(1, 3, 8)],
        (1, 8),
    ),
    "causal": (lambda x: functional.scaled_dot_product_attention(x, x * 2, x + 1, is_causal=True), [HEADS], None),
    "same_output_twice": (lambda x: (x * 2, x, (y := x * 3), y), [(2, 8)], None),
    "one_input_unused": (lambda x, y: x * 2, [(2, 8), (3,)], None),
    "other_outputs": (lambda x, ids: (x.argmax(-1), ids * 2 + 1, x > 0), [(2, 8)], (1, 5)),
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(lower, apple) -> dict[str, float]:
    """Decibels by output of all cases in one program."""
    program = apple.program_of_all(CASES)
    artifact = lower(program, TorchToCoreAI("float32"))
    assert "i64" not in {spec.dtype for spec in (*artifact.signature.inputs, *artifact.signature.outputs)}
    return apple.decibels_by_output(RUNTIME, artifact, program)


@pytest.mark.parametrize("name", CASES)
def test_computes_what_torch_computes(name, measured) -> None:
    found = {output: ratio for output, ratio in measured.items() if output.rstrip("_0123456789") == name}
    assert found
    assert min(found.values()) > 90, found


class Bits(torch.nn.Module):
    """Integer arithmetic that Core AI has no operator for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + ((x * 4).to(torch.int32) & 3)


@pytest.mark.parametrize("compute", ["float16", "float32"])
def test_an_operator_without_lowering_is_named_with_its_place(compute, lower, apple) -> None:
    program = apple.program_of(torch.nn.Sequential(torch.nn.Linear(8, 8), Bits()), (1, 8))
    with pytest.raises(UnsupportedOpError, match=r"Core AI.*aten.*and.* at 1; rewrite that layer"):
        lower(program, TorchToCoreAI(compute))
