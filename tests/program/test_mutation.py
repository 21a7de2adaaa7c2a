"""Models that write in place keep their meaning in the normal form; those with state are refused."""

import pytest
import torch
from torch import nn

from edgeship.core.model import TensorSpec
from edgeship.errors import SourceError
from edgeship.program.export import make_program
from edgeship.program.mutation import written

X = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def copy_then_change(x):
    y = x.clone()
    y += 1
    return x * y


def change_then_read(x):
    y = x * 2
    z = y
    y.add_(1)
    return y + z


def constant_with_parts(x):
    mask = torch.zeros(4)
    mask[1] = 2
    mask[2:] = -1
    return x * mask.reshape(1, 4, 1, 1)


def constant_read_between_writes(x):
    mask = torch.zeros(6)
    first = x + mask
    mask[1] = 2
    return first * 2 + (x * mask)


def constant_with_a_part_of_the_input(x):
    table = torch.zeros(4)
    table[0] = x.sum()
    return x + table.reshape(1, 4, 1, 1)


def part_of_a_copy(x):
    y = x.clone()
    y[:, 0] = 0
    return y + x


def view_of_a_view(x):
    y = x.clone()
    y.view(1, 4, 36)[:, 1:3].mul_(3)
    return y


def input_itself(x):
    x.mul_(2)
    return x + 1


def relu_in_place_on_the_input(x):
    return nn.functional.relu_(x) - 0.1


def lifted_constant(x):
    table = torch.tensor([1.0, 2.0, 3.0, 4.0])
    table[0] = 5
    return x * table.reshape(1, 4, 1, 1) + torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)


CASES = [
    copy_then_change, change_then_read, constant_with_parts, constant_read_between_writes,
    constant_with_a_part_of_the_input, part_of_a_copy, view_of_a_view, input_itself, relu_in_place_on_the_input,
    lifted_constant,
]  # fmt: skip


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_the_answer_stays(function):
    program = make_program(Call(function), [TensorSpec("x", "f32", (1, 4, 6, 6))], [X.clone()])
    for seed in (1, 2):
        x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
        given = x.clone()
        (found,) = program.module()(given)
        assert torch.equal(given, x), "the caller's input was changed"
        torch.testing.assert_close(found, function(x.clone()))
    assert not any(written(node) for node in program.exported.graph.nodes)
    assert len(program.exported.graph_signature.output_specs) == 1


def test_layers_that_write_in_place_still_fold():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(inplace=True)).eval()
    program = make_program(model, [TensorSpec("x", "f32", (1, 4, 6, 6))], [X])
    names = [str(node.target) for node in program.exported.graph.nodes if node.op == "call_function"]
    assert names == ["aten.conv2d.default", "aten.relu.default"]


def test_a_model_with_state_is_refused_by_the_name_of_its_state():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count[0] += 1
            return x + self.count

    model = Counter()
    with pytest.raises(SourceError, match="changes its buffers while it runs: count"):
        make_program(model, [TensorSpec("x", "f32", (1, 4, 6, 6))], [X])
