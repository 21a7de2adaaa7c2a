"""The static form answers as the program did, and holds only what can carry integer grids."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeship.core.model import TensorSpec
from edgeship.program.export import make_program
from edgeship.program.program import TorchProgram
from edgeship.program.rewrites import MASKED, for_static_activations, spelled_out_attention


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


def program_of(function: Callable[..., Any], *tensors: torch.Tensor) -> TorchProgram:
    kinds: dict[torch.dtype, Any] = {torch.float32: "f32", torch.int64: "i64"}
    specs = [
        TensorSpec(name, kinds[tensor.dtype], tuple(tensor.shape))
        for name, tensor in zip("xyzw", tensors, strict=False)
    ]
    return make_program(Function(function), specs, tensors)


def targets(program: TorchProgram) -> set[str]:
    return {
        str(getattr(node.target, "__name__", "")).split(".")[0]
        for node in program.exported.graph.nodes
        if node.op == "call_function"
    }


def check_same(program: TorchProgram, static: TorchProgram, *tensors: torch.Tensor) -> None:
    with torch.no_grad():
        for wanted, found in zip(program.module()(*tensors), static.module()(*tensors), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def heads() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)


def test_attention_is_spelled_out() -> None:
    tensors = heads()
    program = program_of(functional.scaled_dot_product_attention, *tensors)
    static = for_static_activations(program)
    assert {"matmul", "softmax"} <= targets(static)
    assert "scaled_dot_product_attention" not in targets(static)
    check_same(program, static, *tensors)


def test_a_view_after_attention_survives_the_change_of_strides() -> None:
    tensors = heads()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 6, 16)

    program = program_of(attend, *tensors)
    check_same(program, for_static_activations(program), *tensors)


@pytest.mark.parametrize("bits", [8, 16])
def test_padding_masks_are_finite_and_still_mask(bits: int) -> None:
    tensors = heads()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, mask[:, None, None, :].to(torch.bool))

    program = program_of(attend, *tensors, mask)
    static = for_static_activations(program, bits)
    check_same(program, static, *tensors, mask)
    constants = [arg for node in static.exported.graph.nodes for arg in node.args if isinstance(arg, float)]
    assert MASKED[bits] in constants
    assert min(constants) == MASKED[bits]


def test_masks_made_by_arithmetic_are_finite() -> None:
    scores, mask = torch.randn(1, 4, 4), torch.tensor([[1, 1, 0, 1]])

    def attend(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        added = (1.0 - mask[:, None, :].to(torch.float32)) * torch.finfo(torch.float32).min
        return torch.softmax(scores + added, -1)

    program = program_of(attend, scores, mask)
    static = for_static_activations(program)
    check_same(program, static, scores, mask)
    assert min(arg for node in static.exported.graph.nodes for arg in node.args if isinstance(arg, float)) == MASKED[16]


def test_a_mask_kept_as_a_buffer_is_finite() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x + self.mask, -1)

    x = torch.randn(1, 4, 4)
    program = make_program(Causal(), [TensorSpec("x", "f32", (1, 4, 4))], [x])
    static = for_static_activations(program)
    assert float(static.weight("mask").min()) == MASKED[16]
    check_same(program, static, x)
    assert float(program.weight("mask").min()) == float("-inf")


def test_large_negative_numbers_elsewhere_stay() -> None:
    x = torch.randn(1, 4)
    program = program_of(lambda x: x * -20000.0, x)
    check_same(program, for_static_activations(program), x)


def test_a_root_below_becomes_a_division() -> None:
    x = torch.rand(1, 8) + 0.5
    program = program_of(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), x)
    static = for_static_activations(program)
    assert {"div", "sqrt"} <= targets(static)
    assert "rsqrt" not in targets(static)
    check_same(program, static, x)


@pytest.mark.parametrize(
    "function",
    [functional.relu6, functional.hardtanh, lambda x: x.clamp(-0.5, 0.25), lambda x: x.clamp(min=0.1), functional.silu],
)
def test_clips_and_silu_keep_their_answers(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(1, 64) * 5
    program = program_of(function, x)
    for bits in (8, 16):
        check_same(program, for_static_activations(program, bits), x)
    assert not {"relu6", "hardtanh", "clamp", "silu"} & targets(for_static_activations(program, 16))


def test_grouped_queries_repeat_the_keys() -> None:
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    wanted = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)
    found = spelled_out_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_inventory_is_that_of_the_new_graph() -> None:
    tensors = heads()
    program = program_of(functional.scaled_dot_product_attention, *tensors)
    static = for_static_activations(program)
    assert static.record.inventory.macs == program.record.inventory.macs
    assert len(static.record.inventory.ops) > len(program.record.inventory.ops)


def test_indexing_that_only_moves_axes_is_a_view() -> None:
    x = torch.arange(6).reshape(1, 6)
    program = program_of(lambda x: x[torch.zeros(1, 1, 1, 1, dtype=torch.long), torch.arange(6)], x)
    assert "index" not in targets(program)
    check_same(program, program, x)
    gathered = program_of(lambda x: x[:, torch.tensor([5, 0])], x)
    assert "index" in targets(gathered)
