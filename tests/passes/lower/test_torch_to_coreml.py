"""lower/torch_to_coreml: how it plans, and static activations stored as they were decided."""

import dataclasses

import numpy as np
import pytest
import torch

from edgeship.compression.affine import quantize_nearest
from edgeship.compression.calibrate import decide_activations
from edgeship.core.choice import Choice
from edgeship.core.model import Signature, Source, TensorSpec
from edgeship.core.passes import Skip
from edgeship.core.profile import Profile, Request
from edgeship.core.registry import targets
from edgeship.core.weights import ActivationEncoding, Affine, Float
from edgeship.errors import EncodingError, UsageError
from edgeship.passes.lower.torch_to_coreml import TorchToCoreML
from edgeship.program.export import make_program
from edgeship.runtimes.coreml.runtime import RUNTIME


def request(tmp_path, runtime="coreml", weights="int8") -> Request:
    source = Source(tmp_path, Signature((), ()))
    return Request(source, targets()["iphone15pro"], runtime, Profile("p", "A profile.", Choice(weights)))


def test_plan(tmp_path) -> None:
    asked = request(tmp_path)
    assert TorchToCoreML.plan(asked) == TorchToCoreML(
        asked.target.setting("coreml.minimum_deployment_target"), "float16"
    )
    assert TorchToCoreML.plan(request(tmp_path, weights="float32")).compute == "float32"
    skipped = TorchToCoreML.plan(request(tmp_path, runtime="onnx"))
    assert isinstance(skipped, Skip)
    assert skipped.reason == "only for runtime coreml"
    with pytest.raises(UsageError, match='no Core ML target "iOS12"; use one of iOS16'):
        TorchToCoreML("iOS12")


def with_grids(program, bits: int = 8):
    """A grid after the input x and every convolution, linear and relu."""
    grids = {}
    for place, node in enumerate(program.exported.graph.nodes):
        if node.name == "x" or str(node.target).startswith(("aten.conv", "aten.relu", "aten.linear")):
            # Scales on the float16 grid, zero points at both ends and between.
            grids[node.name] = ActivationEncoding(
                bits, float(np.float16(0.02 + 0.001 * place)), (-128, 0, 5)[place % 3]
            )
    record = dataclasses.replace(program.record, activations=grids)
    return dataclasses.replace(program, record=record)


def test_static_activations_are_stored_as_decided(layers_program, with_encoded, lower) -> None:
    weights = {
        name: quantize_nearest(layers_program.weights[name], Affine()) for name in ("stem.weight", "first.weight")
    }
    program = with_grids(with_encoded(layers_program, weights))
    artifact = lower(program, TorchToCoreML("iOS17", "float32"))
    assert len(program.activations) > 5
    assert RUNTIME.read_activations(artifact) == program.activations
    inputs = {"x": torch.randn(1, 3, 16, 16).numpy(), "ids": np.array([[3, 1, 39, 0, 7]])}
    with RUNTIME.open(artifact) as session, torch.no_grad():
        found = session.run(inputs)["image"]
        image = program.module()(torch.from_numpy(inputs["x"]), torch.from_numpy(inputs["ids"]))[0].numpy()
    step = max(grid.scale for grid in program.activations.values())
    # Sums in another order may fall on the other side of a boundary between two integers.
    assert np.mean(np.abs(found - image) > 1e-4) < 0.02
    assert np.abs(found - image).max() <= 2.5 * step


class Alike(torch.nn.Module):
    """Grids that are equal, on views of integers, on an input, and twice on what is computed twice."""

    def forward(self, x):
        return torch.relu(x).reshape(1, 32) + 1, torch.relu(x).flatten(1).reshape(4, 8) * 2


@pytest.mark.parametrize("compute", ["float16", "float32"])
def test_every_grid_is_found_under_its_own_name(compute, lower) -> None:
    program = make_program(Alike(), [TensorSpec("x", "f32", (1, 4, 8))], [torch.randn(1, 4, 8)])
    nodes = [node.name for node in program.exported.graph.nodes if node.op in ("placeholder", "call_function")]
    grids = {name: ActivationEncoding(8, 0.03125, -3) for name in nodes}
    program = dataclasses.replace(program, record=dataclasses.replace(program.record, activations=grids))
    artifact = lower(program, TorchToCoreML("iOS17", compute))
    assert RUNTIME.read_activations(artifact) == grids
    with pytest.raises(EncodingError, match=r"iOS 16 has no quantized activations; .*target=iOS17"):
        lower(program, TorchToCoreML("iOS16", compute))


class Scaled(torch.nn.Module):
    """A constant among the activations, which gets a grid as they do."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 4)
        self.scale = torch.nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        return self.layer(x * self.scale)


def test_a_constant_on_a_grid_is_no_weight(lower, with_encoded) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 8) for _ in range(4)]
    program = make_program(Scaled(), [TensorSpec("x", "f32", (1, 8))], inputs[:1])
    program = with_encoded(program, {"layer.weight": quantize_nearest(program.weights["layer.weight"], Affine())})
    grids = decide_activations(program, [{"x": item.numpy()} for item in inputs], bits=8, method="minmax")
    program = dataclasses.replace(program, record=dataclasses.replace(program.record, activations=grids))
    artifact = lower(program, TorchToCoreML("iOS17", "float32"))
    assert list(RUNTIME.read_weights(artifact)) == ["layer.weight"]
    assert "on their grid" in RUNTIME.holds("other", Float(32), "int8")


def test_grids_that_core_ml_has_not(layers_program, lower) -> None:
    with pytest.raises(EncodingError, match="int8 only, not int16"):
        lower(with_grids(layers_program, 16), TorchToCoreML("iOS17"))
    odd = dataclasses.replace(layers_program.record, activations={"x": ActivationEncoding(8, 0.1, 0)})
    with pytest.raises(EncodingError, match=r"0\.1 of x is not a float16 number"):
        lower(dataclasses.replace(layers_program, record=odd), TorchToCoreML("iOS17"))
