"""The range of an integer input is what its uses in the graph allow."""

import pytest
import torch
from torch import nn

from edgeship.core.model import TensorSpec
from edgeship.program.export import make_program
from edgeship.program.ranges import outputs_of_shares


class Uses(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.table, self.line = kind, nn.Embedding(50, 4), nn.Linear(4, 4)
        self.register_buffer("grid", torch.randn(7, 4))
        self.register_buffer("kinds", torch.arange(2, 11))

    def forward(self, x, ids):
        y = self.line(x)
        match self.kind:
            case "table":
                return y + self.table(ids)
            case "shifted table":
                return y + self.table(ids.reshape(-1) + 10).reshape(1, 3, 4)
            case "strided table":
                return y + self.table(ids * 7 - 3)
            case "indexed":
                return y + self.grid[ids]
            case "both":
                return y + self.table(ids) + self.grid[ids]
            case "mask":
                return y.masked_fill((ids == 0).unsqueeze(-1), -1.0)
            case "additive mask":
                return y + ((1 - ids.float()) * -3.4e38).unsqueeze(-1).clamp(min=-1e4)
            case "clamped":
                return y + ids.clamp(2, 9).float().unsqueeze(-1)
            case "one hot":
                return y + (ids.unsqueeze(-1) == self.kinds).float() @ self.line.weight.new_ones(9, 4)
            case "nothing known":
                return y * ids.float().unsqueeze(-1)


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        ("table", 0, 49), ("shifted table", -10, 39), ("strided table", 1, 7), ("indexed", -7, 6), ("both", 0, 6),
        ("mask", 0, 1), ("additive mask", 0, 1), ("clamped", 2, 9), ("one hot", 2, 10), ("nothing known", 0, 1),
    ],
)  # fmt: skip
def test_what_the_graph_shows(kind, low, high):
    torch.manual_seed(0)
    specs = [TensorSpec("x", "f32", (1, 3, 4)), TensorSpec("ids", "i64", (1, 3))]
    program = make_program(Uses(kind), specs, [torch.randn(1, 3, 4), torch.ones(1, 3, dtype=torch.int64)])
    spec = program.signature.inputs[1]
    assert (spec.low, spec.high) == (low, high)
    assert program.signature.inputs[0] == specs[0]
    module = program.module()
    for end in (low, high):
        module(torch.randn(1, 3, 4), torch.full((1, 3), end))


def test_a_range_that_was_said_stays():
    specs = [TensorSpec("x", "f32", (1, 3, 4)), TensorSpec("ids", "i64", (1, 3), low=3, high=5)]
    program = make_program(Uses("table"), specs, [torch.randn(1, 3, 4), torch.ones(1, 3, dtype=torch.int64)])
    assert program.signature.inputs[1] == specs[1]


def test_outputs_that_are_shares_are_known_by_what_makes_them():
    class Heads(nn.Module):
        def forward(self, x):
            score = x.sigmoid()
            joined = torch.cat([score, x.softmax(-1)], 1).permute(0, 2, 1)
            raised = (x - x.amax(-1, keepdim=True)).exp()
            written = raised / raised.sum(-1, keepdim=True)
            return score.reshape(-1), joined, torch.cat([score, 640 * score], 1), x.tanh(), written, score.mean(1)

    torch.manual_seed(0)
    program = make_program(Heads(), [TensorSpec("x", "f32", (1, 3, 4))], [torch.randn(1, 3, 4)])
    assert outputs_of_shares(program) == {"output", "output_1", "output_4", "output_5"}
