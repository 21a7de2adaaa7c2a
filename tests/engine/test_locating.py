"""A lowering that is wrong at one operator is found at that operator."""

import dataclasses
from typing import ClassVar

import pytest
import torch
from torch import nn

from edgeship.core.model import OnnxModel, TensorSpec, TorchModel
from edgeship.core.passes import Context, Pass
from edgeship.engine.locating import find_place
from edgeship.passes.check.verify import VerifyArtifact
from edgeship.passes.lower.torch_to_onnx import TorchToOnnx
from edgeship.program.export import make_program


@dataclasses.dataclass(frozen=True)
class Wrong(Pass):
    """Lower, and change every operator of one kind."""

    name: ClassVar[str] = "lower/wrong"
    changed: str = "Tanh"
    into: str = "Sigmoid"

    @classmethod
    def plan(cls, request):
        return cls()

    def run(self, model: TorchModel, ctx: Context) -> OnnxModel:
        import onnx

        artifact = TorchToOnnx().run(model, ctx)
        graph = onnx.load(artifact.path)
        for node in graph.graph.node:
            if node.op_type == self.changed:
                node.op_type = self.into
        onnx.save(graph, artifact.path)
        return artifact


class Deep(nn.Module):
    def __init__(self, where):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(40))
        self.where = where

    def forward(self, x):
        for place, layer in enumerate(self.layers):
            x = layer(x)
            x = x.tanh() if place == self.where else x.relu() + 0.1 * x
        return x


@pytest.mark.parametrize(
    "where", [17, pytest.param(0, marks=pytest.mark.heavy), pytest.param(39, marks=pytest.mark.heavy)]
)
def test_the_operator_is_named(where, tmp_path):
    torch.manual_seed(0)
    program = make_program(Deep(where), [TensorSpec("x", "f32", (1, 8))], [torch.randn(1, 8)])
    program.save(tmp_path / "p")
    source = TorchModel(tmp_path / "p", program.signature)
    place = find_place(source, [Wrong()], VerifyArtifact("onnx"), ["noise"], tmp_path / "work")
    assert place.operator == "tanh"
    assert place.kind == "noise"
    assert place.snr_db < 30
    assert place.before_db > 70


def test_a_lowering_that_is_right_has_no_place(tmp_path):
    torch.manual_seed(0)
    program = make_program(Deep(3), [TensorSpec("x", "f32", (1, 8))], [torch.randn(1, 8)])
    program.save(tmp_path / "p")
    source = TorchModel(tmp_path / "p", program.signature)
    assert find_place(source, [TorchToOnnx()], VerifyArtifact("onnx"), ["noise", "zeros"], tmp_path / "work") is None
