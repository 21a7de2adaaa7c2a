"""A program that ends at other values answers with those values, and keeps its weights."""

import pytest
import torch
from torch import nn

from edgeship.core.model import TensorSpec, TorchModel
from edgeship.errors import LoweringError
from edgeship.program.cut import cut_at
from edgeship.program.export import make_program
from edgeship.program.program import TorchProgram


def program_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5), nn.Tanh())
    return make_program(model, [TensorSpec("x", "f32", (1, 8))], [torch.randn(1, 8)]), model


def test_values_on_the_way_are_those_of_the_module(tmp_path):
    program, model = program_of()
    cut = cut_at(program, ["relu", "linear"])
    cut.save(tmp_path / "p")
    opened = TorchProgram.open(TorchModel(tmp_path / "p", cut.signature))
    x = torch.randn(1, 8)
    relu, linear = opened.module()(x)
    assert torch.equal(linear, model[0](x))
    assert torch.equal(relu, model[:2](x))
    assert [(spec.name, spec.shape) for spec in opened.signature.outputs] == [("relu", (1, 16)), ("linear", (1, 16))]
    assert "2.weight" not in {use.name for use in opened.record.inventory.weights if use.nodes}
    again = program.module()(x)[0]
    assert torch.allclose(again, model(x)), "the program itself is as it was"


@pytest.mark.parametrize("name", ["nothing", "output"])
def test_what_is_no_value_is_refused(name):
    with pytest.raises(LoweringError, match=f"{name} is not a value of the program"):
        cut_at(program_of()[0], [name])
