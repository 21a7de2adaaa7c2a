import numpy as np
import pytest
import torch
from torch import nn

from edgeship.compression.walk import Operators, Replacement, walk
from edgeship.core.model import TensorSpec
from edgeship.errors import DataError
from edgeship.program.export import make_program


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.third(h + self.second(h))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return make_program(Net(), [TensorSpec("x", "f32", (2, 6))], [torch.randn(2, 6)])


@pytest.fixture(scope="module")
def batches():
    return [{"x": row} for row in np.random.default_rng(0).standard_normal((5, 2, 6)).astype(np.float32)]


def expected(weights, batches):
    """Inputs of the three layers with given weights."""
    found = {"first.weight": [], "second.weight": [], "third.weight": []}
    for batch in batches:
        x = torch.from_numpy(batch["x"])
        h = torch.relu(x @ weights["first.weight"].T + weights["first.bias"])
        found["first.weight"].append(x)
        found["second.weight"].append(h)
        found["third.weight"].append(h + h @ weights["second.weight"].T + weights["second.bias"])
    return found


@pytest.mark.parametrize("reference", [True, False])
def test_layers_see_what_changed_layers_made_and_what_the_float_model_has(program, batches, reference):
    seen = {}

    def visit(layer):
        seen[layer.use.name] = list(layer.inputs), layer.wanted and list(layer.wanted)
        return None if layer.use.name == "third.weight" else Replacement(layer.weight * 0.5, torch.zeros(8))

    walk(program, batches, visit, reference=reference)
    assert list(seen) == ["first.weight", "second.weight", "third.weight"]
    halved = {name: value * 0.5 if name.endswith("weight") else value * 0 for name, value in program.weights.items()}
    changed, original = expected(halved, batches), expected(program.weights, batches)
    for name, (inputs, wanted) in seen.items():
        torch.testing.assert_close(inputs, changed[name])
        if reference:
            torch.testing.assert_close(wanted, original[name])
        else:
            assert wanted is None


def test_a_layer_says_what_the_model_would_answer_with_another_weight(program, batches):
    answers = {}

    def visit(layer):
        answers[layer.use.name] = layer.answers(layer.weight * 2, [3, 1])
        return None

    walk(program, batches, visit, answers=True)
    for name, found in answers.items():
        module = program.filled().module()
        parameter = dict(module.named_parameters())[name]
        parameter.data = parameter.data * 2
        wanted = [[module(torch.from_numpy(batches[number]["x"]))[0]] for number in (3, 1)]
        torch.testing.assert_close(found, wanted)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(torch.relu(self.table(ids)))


def test_a_tied_table_is_met_where_it_multiplies_and_changed_everywhere():
    torch.manual_seed(0)
    example = torch.arange(4)[None]
    program = make_program(Tied(), [TensorSpec("ids", "i64", (1, 4))], [example])
    seen = []

    def visit(layer):
        seen.append((layer.inputs[0].shape, layer.answers(layer.weight * 2, [0])))

    walk(program, [{"ids": example.numpy()}], visit, answers=True)
    assert [shape for shape, _ in seen] == [(1, 4, 6)]
    table = 2 * program.weight(program.record.inventory.weights[0].name)
    torch.testing.assert_close(seen[0][1], [[torch.relu(table[:4]) @ table.T[None]]])


def test_no_samples_and_not_finite_ones_are_refused(program, batches):
    with pytest.raises(DataError, match="at least one sample"):
        walk(program, [], lambda layer: None)
    with pytest.raises(DataError, match="makes NaN"):
        walk(program, [{"x": np.full((2, 6), np.nan, np.float32)}], lambda layer: None)


class Shared(nn.Module):
    """Two layers read the same input with another between them, one reads a fixed table, one comes behind the last."""

    def __init__(self):
        super().__init__()
        self.left, self.middle, self.right = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.scale, self.last = nn.Parameter(torch.randn(6)), nn.Linear(6, 4)

    def forward(self, x):
        steps = torch.arange(6, dtype=torch.float32) / 6
        h = torch.relu(x)
        between = self.middle(self.left(h) * self.scale)
        first, second = (between + self.right(h) + steps).split(3, -1)
        return torch.softmax(self.last(torch.cat([second, first], -1) + h), -1)


@pytest.mark.parametrize("limit", [0, 1 << 20])
@pytest.mark.parametrize("reference", [True, False])
def test_what_does_not_fit_into_memory_says_the_same(limit, reference, monkeypatch, tmp_path):
    monkeypatch.setattr("edgeship.compression.walk.HELD_BYTES", limit)
    torch.manual_seed(1)
    net = Shared().eval()
    program = make_program(net, [TensorSpec("x", "f32", (2, 6))], [torch.randn(2, 6)])
    batches = [{"x": row} for row in np.random.default_rng(1).standard_normal((4, 2, 6)).astype(np.float32)]
    seen = {}

    def visit(layer):
        seen[layer.use.name] = list(layer.inputs), layer.wanted and list(layer.wanted), layer.source
        return Replacement(lambda: layer.weight * 0.5)

    walk(program, batches, visit, reference=reference, folder=tmp_path)
    # Layers of one input are met together.
    assert list(seen) == ["left.weight", "right.weight", "middle.weight", "last.weight"]
    assert seen["left.weight"][2] is seen["right.weight"][2]
    found = {}

    def remember(name):
        return lambda module, given, answer: found.setdefault(name, []).append(given[0])

    for factor, place in ((0.5, 0), (1.0, 1))[: 1 + reference]:
        found.clear()
        other = Shared().eval()
        other.load_state_dict(net.state_dict())
        for name, module in other.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.data *= factor
                module.register_forward_hook(remember(f"{name}.weight"))
        for batch in batches:
            other(torch.from_numpy(batch["x"]))
        for name, given in found.items():
            torch.testing.assert_close(seen[name][place], given)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_run_behind_the_last_layer_and_fixed_numbers_once(monkeypatch):
    torch.manual_seed(1)
    program = make_program(Shared().eval(), [TensorSpec("x", "f32", (2, 6))], [torch.randn(2, 6)])
    ran = []
    call = Operators.call

    def counted(self, node, *rest):
        ran.append(str(node.target))
        return call(self, node, *rest)

    monkeypatch.setattr(Operators, "call", counted)
    walk(program, [{"x": np.ones((2, 6), np.float32)}] * 3, lambda layer: None)
    assert not [name for name in ran if "softmax" in name]
    assert len([name for name in ran if "arange" in name]) <= 1
    assert len([name for name in ran if "relu" in name]) == 3
