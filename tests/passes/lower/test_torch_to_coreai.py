"""lower/torch_to_coreai: how it plans, and static activations stored as they were decided."""

import dataclasses

import numpy as np
import pytest
import torch

from edgeship.core.choice import Choice
from edgeship.core.model import Signature, Source, TensorSpec
from edgeship.core.passes import Skip
from edgeship.core.profile import Profile, Request
from edgeship.core.registry import targets
from edgeship.core.weights import ActivationEncoding
from edgeship.errors import EncodingError
from edgeship.passes.lower.torch_to_coreai import TorchToCoreAI
from edgeship.program.export import make_program
from edgeship.runtimes.coreai.runtime import RUNTIME


def request(tmp_path, runtime="coreai", weights="int8") -> Request:
    source = Source(tmp_path, Signature((), ()))
    return Request(source, targets()["iphone15pro"], runtime, Profile("p", "A profile.", Choice(weights)))


def test_plan(tmp_path) -> None:
    assert TorchToCoreAI.plan(request(tmp_path)) == TorchToCoreAI("float16")
    assert TorchToCoreAI.plan(request(tmp_path, weights="float32")) == TorchToCoreAI("float32")
    skipped = TorchToCoreAI.plan(request(tmp_path, runtime="onnx"))
    assert isinstance(skipped, Skip)
    assert skipped.reason == "only for runtime coreai"


def with_grids(program, bits: int = 8):
    """A grid after the input x and every convolution, linear and relu."""
    grids = {}
    for place, node in enumerate(program.exported.graph.nodes):
        if node.name == "x" or str(node.target).startswith(("aten.conv", "aten.relu", "aten.linear")):
            grids[node.name] = ActivationEncoding(
                bits, float(np.float16(0.02 + 0.001 * place)), (-128, 0, 5)[place % 3]
            )
    record = dataclasses.replace(program.record, activations=grids)
    return dataclasses.replace(program, record=record)


@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_static_activations_are_stored_as_decided(compute, layers_program, lower) -> None:
    program = with_grids(layers_program)
    artifact = lower(program, TorchToCoreAI(compute))
    assert len(program.activations) > 5
    assert RUNTIME.read_activations(artifact) == program.activations
    torch.manual_seed(1)
    inputs = {"x": torch.randn(1, 3, 16, 16).numpy(), "ids": np.array([[3, 1, 39, 0, 7]])}
    with RUNTIME.open(artifact) as session, torch.no_grad():
        found = session.run(inputs)["image"]
        image = program.module()(torch.from_numpy(inputs["x"]), torch.from_numpy(inputs["ids"]))[0].numpy()
    step = max(grid.scale for grid in program.activations.values())
    if compute == "float32":
        # Sums in another order may fall on the other side of a boundary between two integers.
        assert np.mean(np.abs(found - image) > 0.6 * step) < 0.02
    # Twelve grids one after another: 28 dB in float16, as in Core ML's evaluator.
    assert np.mean((found - image) ** 2) < 10**-2.5 * np.mean(image**2)


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
    artifact = lower(program, TorchToCoreAI(compute))
    assert RUNTIME.read_activations(artifact) == grids


def test_grids_that_core_ai_has_not(layers_program, lower) -> None:
    with pytest.raises(EncodingError, match="int8 only"):
        lower(with_grids(layers_program, 16), TorchToCoreAI())
    odd = dataclasses.replace(layers_program.record, activations={"x": ActivationEncoding(8, 0.1, 0)})
    with pytest.raises(EncodingError, match=r"0\.1 .* is not a float16 number"):
        lower(dataclasses.replace(layers_program, record=odd), TorchToCoreAI())
