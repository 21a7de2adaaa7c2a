"""Clips and pads that are left out of static graphs change no bit of the answers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from edgeship.core.model import TensorSpec
from edgeship.lowering.onnx import activations
from edgeship.lowering.onnx.activations import store_activations
from edgeship.lowering.onnx.export import export_graph
from edgeship.lowering.onnx.folds import fold_pads
from edgeship.lowering.onnx.save import save_model
from edgeship.lowering.onnx.weights import place_weights
from edgeship.program.export import make_program

SHAPE = (1, 4, 9, 10)


def _model():
    import torch
    from torch import nn
    from torch.nn import functional

    class Clips(nn.Module):
        """Convolutions with clips of every kind between them, and pads that torch's convolutions cannot say."""

        def __init__(self):
            super().__init__()
            self.clips = [
                functional.relu, functional.relu6, functional.hardtanh, lambda x: x.clamp(-0.5, 2.0),
                lambda x: x.clamp(max=1.0), lambda x: x.clamp(min=-0.25), lambda x: functional.hardtanh(x, 0.0, 3.0),
            ]  # fmt: skip
            self.first = nn.ModuleList(nn.Conv2d(4, 6, 3, 2, 1) for _ in self.clips)
            self.second = nn.ModuleList(nn.Conv2d(6, 6, 3, 2, 0, 1, 6 if i % 2 else 1) for i in range(len(self.clips)))

        def forward(self, x):
            found = []
            for clip, first, second in zip(self.clips, self.first, self.second, strict=True):
                y = clip(first(4 * x))
                z = functional.pad(y, (0, 1, 0, 1))
                found += [second(z), second(functional.pad(z, (0, 1, 1, 1))).sum()]
            kept = functional.relu6(self.first[0](x))
            return *found, kept, functional.pad(kept, (0, 1, 0, 1)), functional.pad(x, (1, 0), value=0.5)

    torch.manual_seed(0)
    return Clips().eval()


def _lowered(program, path, *, folded, monkeypatch):
    with monkeypatch.context() as patch:
        if not folded:
            patch.setattr(activations, "drop_idle_clips", lambda model: None)
        graph, weights = export_graph(program)
        place_weights(graph, weights, program, "int8" if program.activations else "float")
        if program.activations:
            store_activations(graph, program)
        if folded:
            fold_pads(graph)
        save_model(graph, path)
    return Counter(node.op_type for node in graph.graph)


def _answers(path, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


@pytest.fixture(scope="module")
def programs(static_program):
    """The float program, and the same with int8 weights and grids."""
    import torch

    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    plain = make_program(_model(), [TensorSpec("x", "f32", SHAPE)], [x])
    return plain, static_program(plain, 8, 2)


def test_static_graphs_without_their_clips_and_pads_answer_the_same_bits(programs, tmp_path, monkeypatch):
    _, program = programs
    before = _lowered(program, tmp_path / "plain.onnx", folded=False, monkeypatch=monkeypatch)
    after = _lowered(program, tmp_path / "folded.onnx", folded=True, monkeypatch=monkeypatch)
    assert before["Clip"] + before["Relu"] == 8
    # The clip whose result the model gives out stays with its pair, and so do pads that no convolution reads.
    assert after["Clip"] + after["Relu"] == 1
    assert (before["Pad"], after["Pad"]) == (16, 2)
    draw = np.random.default_rng(3)
    for scale in (0.0, 0.1, 1.0, 30.0):
        x = (scale * draw.standard_normal(SHAPE)).astype(np.float32)
        for wanted, found in zip(
            _answers(tmp_path / "plain.onnx", x), _answers(tmp_path / "folded.onnx", x), strict=True
        ):
            np.testing.assert_array_equal(wanted, found)


def test_float_graphs_without_their_pads_answer_as_torch_does(programs, tmp_path, monkeypatch):
    import torch

    program, _ = programs
    after = _lowered(program, tmp_path / "folded.onnx", folded=True, monkeypatch=monkeypatch)
    assert after["Pad"] == 2
    x = np.random.default_rng(3).standard_normal(SHAPE).astype(np.float32)
    with torch.no_grad():
        answers = program.module()(torch.from_numpy(x))
    for wanted, found in zip(answers, _answers(tmp_path / "folded.onnx", x), strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)
