"""An input that nothing reads has no grid: no file would keep it."""

import torch
from torch import nn

from edgeship.compression.grids import activation_nodes
from edgeship.core.model import TensorSpec
from edgeship.program.export import make_program


def test_an_input_that_nothing_reads_has_no_grid() -> None:
    class First(nn.Module):
        def forward(self, x: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
            return torch.relu(x)

    specs = [TensorSpec("x", "f32", (1, 4)), TensorSpec("unused", "f32", (1, 2))]
    program = make_program(First(), specs, [torch.randn(1, 4), torch.randn(1, 2)])
    assert [node.name for node in activation_nodes(program.exported)] == ["x", "relu"]
