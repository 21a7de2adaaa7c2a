"""Regions turned to the convolutions' layout answer the same bits with fewer transposes, in float and in integers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from edgeship.core.model import TensorSpec
from edgeship.lowering.litert import layout
from edgeship.lowering.litert.flatbuffer import drop_unused, main_graph, parse, write
from edgeship.lowering.litert.grids import joined_name
from edgeship.passes.check.verify import stored_problem
from edgeship.program.export import make_program
from edgeship.runtimes.litert.runtime import RUNTIME

pytestmark = pytest.mark.xdist_group("litert-layout")

SHAPE = (1, 4, 11, 12)


def _model():
    import torch
    from torch import nn
    from torch.nn import functional

    class Mixed(nn.Module):
        """What stands between convolutions and keeps them from one layout: pads of one side, factors, joins, means."""

        def __init__(self):
            super().__init__()
            self.stem, self.deep, self.same = nn.Conv2d(4, 8, 3, 2), nn.Conv2d(8, 8, 3, 2, groups=8), nn.Conv2d(8, 8, 5)
            self.last, self.wide, self.join = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(22, 5, 1)
            self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
            self.row = nn.Parameter(torch.rand(3))

        def forward(self, x):
            x = functional.relu6(self.stem(functional.pad(x, (0, 1, 0, 1))))
            y = functional.relu(self.deep(functional.pad(x, (0, 1, 1, 1))))
            z = self.same(functional.pad(y, (2, 2, 2, 2))) * self.scale
            w = self.wide(z) * self.row + z
            joined = torch.cat([z, w, self.last(w - z.mean((2, 3), keepdim=True))], 1)
            tall = self.join(functional.pad(joined, (1, 0, 1, 0)))
            return tall, joined, z.sum((1,), keepdim=True), functional.pad(tall, (1, 0), value=0.5)

    torch.manual_seed(0)
    return Mixed().eval()


def _program(bits, static_program):
    import torch

    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    program = make_program(_model(), [TensorSpec("x", "f32", SHAPE)], [x])
    return static_program(program, bits, 2) if bits else program


def _kinds(model, graph):
    names = layout.Layout(model, graph)
    return Counter(names.name(operator) for operator in graph.operators)


@pytest.mark.parametrize("bits", [0, 8, 16])
def test_a_graph_in_one_layout_answers_the_same_bits(bits, lower_to_tflite, static_program, monkeypatch, tmp_path):
    program = _program(bits, static_program)
    with monkeypatch.context() as patch:
        patch.setattr(layout, "keep_layout", lambda model, graph: None)
        patch.setattr(layout, "fold_pads", lambda model, graph: None)
        plain = lower_to_tflite(program, f"int{bits}" if bits else "float")
    model = parse(plain.path.read_bytes())
    graph = main_graph(model)
    before = _kinds(model, graph)
    layout.keep_layout(model, graph)
    middle = _kinds(model, graph)
    layout.fold_pads(model, graph)
    after = _kinds(model, graph)
    drop_unused(model)
    turned = replace(plain, path=tmp_path / "turned.tflite")
    write(model, turned.path)
    assert after["TRANSPOSE"] < before["TRANSPOSE"]
    assert middle["PAD"] == before["PAD"]
    assert after["PAD"] < before["PAD"] or not bits
    assert stored_problem(RUNTIME, turned, program)[0] == ""
    draw = np.random.default_rng(3)
    with RUNTIME.open(plain) as one, RUNTIME.open(turned) as other:
        for scale in (0.0, 1.0, 100.0):
            x = (scale * draw.standard_normal(SHAPE)).astype(np.float32)
            wanted, found = one.run({"x": x}), other.run({"x": x})
            for name in wanted:
                if bits:
                    np.testing.assert_array_equal(wanted[name], found[name])
                else:
                    np.testing.assert_allclose(wanted[name], found[name], rtol=1e-5, atol=1e-4 * scale)


def test_names_of_integers_are_joined():
    assert joined_name(b"conv (int8)", b"pad (int8)") == b"conv+pad (int8)"
    assert joined_name(b"conv+relu (int8)#1", b"relu (int8)") == b"conv+relu (int8)#1"
    assert joined_name(b"t17", b"pad (int16)") == b"pad (int16)"
    assert joined_name(b"conv (int8)", b"t17") == b"conv (int8)"
