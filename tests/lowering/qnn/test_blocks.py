"""Groups on Hexagon: linear layers with a bias and a clip behind them, and scales that it cannot hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edgeship.compression.affine import quantize_nearest
from edgeship.compression.calibrate import decide_activations
from edgeship.compression.lpbq import quantize_npu_block
from edgeship.core.model import TensorSpec, TorchModel
from edgeship.core.passes import Context
from edgeship.core.weights import Affine, same_numbers
from edgeship.data.batches import generate_batches
from edgeship.errors import EncodingError
from edgeship.passes.lower.onnx_to_qnn import OnnxToQnn
from edgeship.passes.lower.torch_to_onnx import TorchToOnnx
from edgeship.program.export import make_program
from edgeship.runtimes.qnn.runtime import RUNTIME

pytest.importorskip("onnxruntime_qnn")
GROUP = Affine(4, granularity="group", group_size=32)


def lowered(quantize, folder):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False), nn.GELU(), nn.Linear(32, 8))
    program = make_program(module.eval(), [TensorSpec("x", "f32", (1, 5, 64))], [torch.randn(1, 5, 64)])
    encoded = {
        use.name: (quantize(program.weight(use.name), GROUP) if use.shape[1] % 32 == 0 else
                   quantize_nearest(program.weight(use.name), Affine(4)))
        for use in program.record.inventory.weights
        if use.op == "linear"
    }  # fmt: skip
    record = replace(program.record, encodings={name: tensor.encoding for name, tensor in encoded.items()})
    program = replace(program, encoded=encoded, record=record)
    grids = decide_activations(program, generate_batches(program.signature, 4), bits=16, method="minmax")
    program = replace(program, record=replace(record, activations=grids))
    program.save(folder / "program")
    for name in ("onnx", "qnn"):
        (folder / name).mkdir()
    graph = TorchToOnnx("int16").run(TorchModel(folder / "program", program.signature), Context(folder / "onnx"))
    return program, OnnxToQnn(57, 75).run(graph, Context(folder / "qnn"))


def test_products_in_groups_are_exact_on_hexagon(tmp_path):
    program, artifact = lowered(quantize_npu_block, tmp_path)
    stored = RUNTIME.read_weights(artifact)
    assert len(stored) == 3
    for name, tensor in program.encoded.items():
        assert same_numbers(tensor, stored[name]) == ""
    x = generate_batches(program.signature, 1, 7)[0]
    with RUNTIME.open(artifact) as session:
        found, second = session.run(x)["output"], session.run_on_cpu(x)["output"]
    wanted = program.module()(torch.from_numpy(x["x"]))[0].numpy()
    for answer in (found, second):
        noise = float(((answer - wanted).astype(np.float64) ** 2).mean())
        assert 10 * np.log10(float((wanted**2).mean()) / noise) > 55


def test_scales_off_its_grid_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(EncodingError, match="npu_block"):
        lowered(quantize_nearest, tmp_path)


@pytest.mark.parametrize("runtime", ["qnn", "qnn-lm"])
def test_groups_are_refused_while_planning_unless_their_scales_are_rounded_for_hexagon(runtime, tmp_path):
    """One line before anything is converted, with the option that helps."""
    from edgeship.core.encodings import encoding_named
    from edgeship.core.registry import runtimes, targets

    hexagon, phone = runtimes()[runtime], targets()["galaxy-s24"]
    groups, channels = encoding_named("int4-g32"), encoding_named("int4")
    refused = hexagon.refused_by_system(groups, phone, {})
    assert "--set compress/quantize.npu_block=true" in refused
    assert hexagon.refused_by_system(groups, phone, {"compress/quantize": {"npu_block": True}}) == ""
    assert hexagon.refused_by_system(channels, phone, {}) == ""


def test_a_plan_with_groups_for_hexagon_ends_in_that_line(tmp_path, monkeypatch):
    import edgeship

    monkeypatch.chdir(tmp_path)
    network = torch.nn.Sequential(torch.nn.Linear(64, 32)).eval()
    order = {"target": "galaxy-s24", "runtime": "qnn", "weights": "int4-g32"}
    with pytest.raises(EncodingError, match="npu_block=true"):
        edgeship.plan(network, torch.zeros(1, 64), **order)
    plan = edgeship.plan(network, torch.zeros(1, 64), **order, passes=[edgeship.Quantize(npu_block=True)])
    assert [step for step in plan.steps if step.name == "lower/onnx_to_qnn"]
