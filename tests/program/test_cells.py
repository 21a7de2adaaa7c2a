"""Steps of recurrent layers in the normal form: ordinary operators, the same numbers as torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgeship.core.model import TensorSpec
from edgeship.program.export import make_program


class Steps(nn.Module):
    """A few steps of one cell, begun with zeros or with a state that is given."""

    def __init__(self, cell: nn.Module, steps: int) -> None:
        super().__init__()
        self.cell, self.steps = cell, steps

    def forward(self, x: torch.Tensor, *state: torch.Tensor) -> Any:
        now: Any = state[0] if len(state) == 1 else (state or None)
        for _ in range(self.steps):
            now = self.cell(x, now)
        return now


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from([nn.LSTMCell, nn.GRUCell, nn.RNNCell]), bias=st.booleans(), width=st.integers(1, 5),
    hidden=st.integers(1, 6), batch=st.integers(1, 3), steps=st.integers(1, 2), given_state=st.booleans(),
)  # fmt: skip
def test_a_step_is_ordinary_operators(
    kind: type[nn.RNNCellBase], bias: bool, width: int, hidden: int, batch: int, steps: int, given_state: bool
) -> None:
    torch.manual_seed(width + 7 * hidden)
    module = Steps(kind(width, hidden, bias=bias), steps).eval()
    examples = [torch.randn(batch, width)]
    if given_state:
        examples += [torch.randn(batch, hidden) for _ in range(2 if kind is nn.LSTMCell else 1)]
    specs = [TensorSpec(f"x{place}", "f32", tuple(value.shape)) for place, value in enumerate(examples)]
    program = make_program(module, specs, examples)
    assert not [node for node in program.exported.graph.nodes if "_cell." in str(node.target)]
    others = [3 * torch.randn_like(value) for value in examples]
    wanted = module(*others)
    found = program.module()(*others)
    for want, have in zip(wanted if isinstance(wanted, tuple) else (wanted,), found, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_a_plain_cell_has_either_activation(activation: str) -> None:
    module = nn.RNNCell(3, 4, nonlinearity=activation).eval()
    x, h = torch.randn(2, 3), torch.randn(2, 4)
    program = make_program(module, [TensorSpec("x", "f32", (2, 3)), TensorSpec("h", "f32", (2, 4))], [x, h])
    torch.testing.assert_close(program.module()(x, h)[0], module(x, h))
