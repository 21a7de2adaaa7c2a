"""Operators with two names: what stands for another takes the same arguments and answers the same."""

import pytest
import torch

from edgeship.core.model import TensorSpec
from edgeship.program.aliases import ALIASES, by_one_name, known_by
from edgeship.program.export import make_program

aten = torch.ops.aten
NAMES = sorted({name.partition(".")[0] for name in ALIASES})
PAIRS = [
    pytest.param(getattr(packet, overload), id=f"{name}{end}.{overload}")
    for name in NAMES
    for end in ("", "_")
    if (packet := getattr(aten, name + end, None)) is not None
    for overload in packet.overloads()
    if "out" not in overload and overload not in ("names", "Dimname", "intlist", "names_dim")
]


def arguments(operator):
    return [(str(item.type), item.default_value) for item in operator._schema.arguments]


@pytest.mark.parametrize("operator", PAIRS)
def test_the_other_name_takes_the_same_arguments(operator) -> None:
    other = known_by(operator)
    assert other is not None
    assert arguments(other) == arguments(operator)
    assert [str(item.type) for item in other._schema.returns] == [str(item.type) for item in operator._schema.returns]


def first(name):
    packet = getattr(aten, name)
    return getattr(packet, packet.overloads()[0])


UNARY = [name for name in NAMES if arguments(first(name)) == [("Tensor", None)]]


@pytest.mark.parametrize("name", UNARY)
def test_and_answers_the_same(name) -> None:
    operator = first(name)
    # An inverse of the hyperbolic cosine begins at 1.
    x = torch.linspace(0.05, 0.95, 7) + (name == "arccosh")
    torch.testing.assert_close(known_by(operator)(x), operator(x))


def test_what_has_one_name_stays() -> None:
    assert known_by(aten.relu.default) is None
    assert known_by(torch.add) is None


class Named(torch.nn.Module):
    def forward(self, x):
        y = torch.multiply(x, 2.0) + torch.divide(x, 3.0, rounding_mode="floor") - torch.true_divide(x, x.abs() + 1)
        y = y.multiply_(1.5)
        return torch.concat([y, torch.swapaxes(x, 0, 1).T]), torch.special.log_softmax(x, 1), torch.greater(x, 0)


def test_the_normal_form_has_one_name_for_each() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5)
    program = make_program(Named(), [TensorSpec("x", "f32", (2, 5))], [x])
    targets = [node.target for node in program.exported.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if known_by(target)]
    assert by_one_name(program.exported.graph) == 0
    for found, wanted in zip(program.module()(x), Named()(x), strict=True):
        assert torch.equal(found, wanted)
