"""Which nodes have a grid: not an input that nothing reads, and nothing that a suppression decides by."""

import dataclasses
import sys
from pathlib import Path

import torch
from torch import nn

from edgeship.compression.calibrate import decide_activations
from edgeship.compression.grids import activation_nodes
from edgeship.core.model import TensorSpec
from edgeship.program.export import make_program

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vision_operators import nms


def test_an_input_that_nothing_reads_has_no_grid() -> None:
    class First(nn.Module):
        def forward(self, x: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
            return torch.relu(x)

    specs = [TensorSpec("x", "f32", (1, 4)), TensorSpec("unused", "f32", (1, 2))]
    program = make_program(First(), specs, [torch.randn(1, 4), torch.randn(1, 2)])
    assert [node.name for node in activation_nodes(program.exported)] == ["x", "relu"]


class Detector(nn.Module):
    """Places of 150 boxes that a suppression keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[150, 8]."""
        made = self.head(x).sigmoid()
        boxes = torch.cat([made[:, :2] * 100, made[:, :2] * 100 + made[:, 2:4] * 40], 1)
        kept: torch.Tensor = nms(boxes, made[:, 4], 0.5)
        return kept


def test_a_suppression_decides_as_it_does_in_float() -> None:
    """In one grid of 256 steps, places among 300 are ties."""
    torch.manual_seed(0)
    x = torch.randn(150, 8)
    program = make_program(Detector(), [TensorSpec("x", "f32", (150, 8))], [x])
    grids = decide_activations(program, [{"x": x.numpy()}], bits=8)
    assert grids
    static = dataclasses.replace(program, record=dataclasses.replace(program.record, activations=grids))
    wanted, found = [set(item.module()(x)[0].tolist()) for item in (program, static)]
    # Corners and scores are those of a head in 8 bits.
    assert len(wanted & found) > 0.85 * max(len(wanted), len(found))
