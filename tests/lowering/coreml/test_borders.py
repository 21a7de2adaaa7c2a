"""What crosses Core ML's border, and biases that its optimizer stops at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from edgeship.core.model import TensorSpec
from edgeship.errors import LoweringError
from edgeship.lowering.coreml.convert import convert
from edgeship.lowering.coreml.package import save
from edgeship.program.export import make_program
from edgeship.runtimes.coreml.evaluator import Evaluator


class _Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + 0.25


def test_a_number_added_to_a_linear_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8)
    module = _Shifted()
    wanted = module(x)
    program = make_program(module, [TensorSpec("x", "f32", (2, 8))], [x])
    converted, _ = convert(program, "iOS17", "float32")
    save(converted, tmp_path / "m.mlpackage")
    found = Evaluator(tmp_path / "m.mlpackage").run({"x": x.numpy()})
    torch.testing.assert_close(torch.as_tensor(found["output"]).reshape(wanted.shape), wanted.detach())


def test_an_input_without_a_dimension_is_refused_with_a_way_out() -> None:
    class Chosen(nn.Module):
        def forward(self, x: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
            return torch.where(rate == 16000, x, -x)

    specs = [TensorSpec("x", "f32", (1, 4)), TensorSpec("rate", "i64", ())]
    program = make_program(Chosen(), specs, [torch.randn(1, 4), torch.tensor(16000)])
    with pytest.raises(LoweringError, match="takes no input without a dimension") as caught:
        convert(program, "iOS17", "float16")
    assert "--input rate=VALUE" in caught.value.fix
