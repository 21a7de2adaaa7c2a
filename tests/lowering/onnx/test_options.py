from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgeship.compression.affine import quantize_nearest
from edgeship.core.model import TensorSpec
from edgeship.core.weights import Affine
from edgeship.lowering.onnx.options import ACCURACY_LEVEL, PRECISION
from edgeship.program.export import make_program
from edgeship.runtimes.onnxruntime import RUNTIME

ODD_GROUP = Affine(4, granularity="group", group_size=8)


def linear(encoding: Affine):
    torch.manual_seed(0)
    program = make_program(torch.nn.Linear(64, 12), [TensorSpec("x", "f32", (2, 64))], [torch.randn(2, 64)])
    encoded = {"weight": quantize_nearest(program.weight("weight"), encoding)}
    return replace(program, encoded=encoded, record=replace(program.record, encodings={"weight": encoding}))


@pytest.mark.parametrize("encoding", [Affine(8), Affine(4), Affine(2), Affine(4, granularity="group", group_size=32)])
@pytest.mark.parametrize("activations", ["float", "dynamic"])
def test_an_app_needs_no_level_where_the_file_says_how_to_compute(encoding, activations, lower_to_onnx):
    program = linear(encoding)
    artifact = lower_to_onnx(program, activations)
    assert artifact.facts == ({PRECISION: "1"} if activations == "dynamic" else {})
    x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    with RUNTIME.open(artifact) as session:
        found = session.run({"x": x})["output"]
    wanted = program.module()(torch.from_numpy(x))[0].detach().numpy()
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert error < 1e-6 if activations == "float" else 1e-4 < error < 0.02


@pytest.mark.parametrize(("activations", "level"), [("float", "1"), ("dynamic", "4")])
def test_an_app_must_set_what_dequantize_linear_leaves_open(activations, level, lower_to_onnx):
    # No kernel has blocks of 8.
    facts = lower_to_onnx(linear(ODD_GROUP), activations).facts
    assert facts == {ACCURACY_LEVEL: level} | ({PRECISION: "1"} if activations == "dynamic" else {})
