"""Constants in arithmetic are spelled as every converter reads them, and the numbers stay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from edgeship.program.normalize import export_normalised

CASES = {
    "mul": lambda x, _: torch.mul(0.5, x),
    "add": lambda x, _: torch.add(0.5, x),
    "sub": lambda x, _: torch.sub(0.5, x),
    "div": lambda x, _: torch.div(0.5, x),
    "maximum": lambda x, inf: torch.maximum(-inf, x),
    "minimum": torch.minimum,
    "both": lambda x, _: x.clamp(-math.inf, math.inf),
    "below": lambda x, _: x.clamp(-math.inf, 0.25),
    "above": lambda x, _: x.clamp(0.25, math.inf),
    "tanh": lambda x, _: nn.functional.hardtanh(x, -math.inf, 0.25),
}


class _Case(nn.Module):
    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("inf", torch.full(shape, math.inf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return CASES[self.name](x, self.inf)


@pytest.mark.parametrize("shape", [(), (1, 3)])
@pytest.mark.parametrize("name", sorted(CASES))
def test_numbers_stand_second_and_nothing_is_bounded_by_infinity(name: str, shape: tuple[int, ...]) -> None:
    x = torch.tensor([[-2.0, 0.1, 3.0], [1.0, 0.5, -0.25]])
    module = _Case(name, shape)
    program = export_normalised(module, (x,), ("x",))
    torch.testing.assert_close(
        program.module()(x)[0] if isinstance(program.module()(x), tuple) else program.module()(x), module(x)
    )
    text = str(program.graph)
    assert "inf" not in text.replace("b_inf", "").replace("infer", "") or name == "div"
    for node in program.graph.nodes:
        if node.op == "call_function" and len(node.args) == 2 and name != "div":
            assert isinstance(node.args[0], torch.fx.Node)


def test_a_bound_that_spreads_a_value_stays() -> None:
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("low", torch.full((4, 3), -math.inf))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.maximum(x, self.low)

    x = torch.randn(1, 3)
    program = export_normalised(Spread(), (x,), ("x",))
    answer = program.module()(x)
    assert (answer[0] if isinstance(answer, tuple) else answer).shape == (4, 3)
