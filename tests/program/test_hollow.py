"""Graphs without their encoded weights."""

import dataclasses

import pytest
import torch

from edgeship.compression.affine import quantize_nearest, to_float16
from edgeship.core.weights import Affine
from edgeship.errors import LoweringError
from edgeship.program.hollow import MASK, fit_scalars, hollow
from edgeship.program.program import TorchProgram


def test_encoded_weights_take_no_memory(layers_program: TorchProgram, with_encoded) -> None:
    encoded = {
        "first.weight": quantize_nearest(layers_program.weights["first.weight"], Affine()),
        "second.weight": to_float16(layers_program.weights["second.weight"]),
    }
    program = with_encoded(layers_program, encoded)
    state = hollow(program, torch.float16, for_float16=True).state_dict
    assert state["first.weight"].stride() == (0, 0)
    assert state["second.weight"].stride() == (0, 0)
    assert state["first.bias"].dtype == torch.float16
    kept = hollow(program, torch.float32, keep_floats=True).state_dict
    assert kept["first.weight"].stride() == (0, 0)
    assert torch.equal(kept["second.weight"], torch.from_numpy(encoded["second.weight"].dequantize()))
    # The program itself is as it was.
    assert program.exported.state_dict["first.weight"].stride() != (0, 0)


def test_masks_fit_float16_and_weights_must(layers_program: TorchProgram) -> None:
    weights = dict(layers_program.weights)
    weights["scale"] = torch.cat([torch.full((1,), float("-inf")), torch.full((63,), -3e38)])
    program = dataclasses.replace(layers_program, weights=weights)
    assert set(hollow(program, torch.float16, for_float16=True).state_dict["scale"].tolist()) == {MASK}
    assert float(hollow(program, torch.float32).state_dict["scale"][0]) == float("-inf")
    weights["scale"] = torch.full((64,), 1e5)
    with pytest.raises(LoweringError, match=r"scale has values beyond float16's 65504.*compute=float32"):
        hollow(program, torch.float16, for_float16=True)


def test_numbers_in_arguments() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.ops.aten.masked_fill.Scalar, (x, x, torch.finfo(torch.float32).min))
    small = graph.call_function(torch.ops.aten.add.Tensor, (x, -7.5))
    fit_scalars(graph)
    assert node.args[2] == MASK
    assert small.args[1] == -7.5
