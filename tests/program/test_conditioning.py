"""How far the original moves by itself, and where it is largest."""

import numpy as np
import pytest
import torch
from torch import nn

from edgeship.core.model import TensorSpec
from edgeship.program.compare import Comparison
from edgeship.program.conditioning import UNIT, Trembling
from edgeship.program.export import make_program
from edgeship.program.saturation import Saturation


def program_of(module, shape=(1, 64)):
    torch.manual_seed(0)
    return make_program(module, [TensorSpec("x", "f32", shape)], [torch.randn(shape)])


def own(program, unit, x):
    comparison = Comparison()
    reference = {"output": program.module()(torch.from_numpy(x))[0].detach().numpy()}
    moved, peak = Trembling(program).run({"x": x}, unit)
    comparison.add(reference, moved)
    return comparison.snr_db, peak


@pytest.mark.parametrize(("kind", "least", "most"), [("f32", 110, 160), ("f16", 50, 80), ("int8", 30, 60)])
def test_a_plain_layer_moves_by_about_the_width(kind, least, most):
    program = program_of(nn.Linear(64, 32))
    x = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    assert least < own(program, UNIT[kind], x)[0] < most


def test_a_difference_of_nearly_equal_values_moves_by_all_of_itself():
    class Difference(nn.Module):
        def forward(self, x):
            return (x * 1.7 + 1000) - (x * 1.7 + 999)

    x = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    assert own(program_of(Difference()), UNIT["f16"], x)[0] < 10


def test_weights_move_by_a_share_of_themselves_or_by_a_step_of_their_rows_grid():
    """Small weights beside a large one lose more to a grid than to a share, as much as rounding them loses."""
    layer = nn.Linear(64, 32, bias=False)
    program = program_of(layer)
    with torch.no_grad():
        layer.weight[:, 0] = 4.0
        program = program_of(layer)
        step = layer.weight.abs().amax(1, keepdim=True) / 127
        stored = (layer.weight / step).round() * step
    x = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    x[:, 0] = 0
    wanted = program.module()(torch.from_numpy(x))[0].detach().numpy()
    rounded = (torch.from_numpy(x) @ stored.T).numpy()
    lost = {}
    for how in ("share", "step"):
        moved = Trembling(program).run({"x": x}, UNIT["f32"] if how == "step" else UNIT["int8"], weights=how)[0][
            "output"
        ]
        lost[how] = float(np.square(moved - wanted).sum())
    assert lost["step"] > 10 * lost["share"]
    assert lost["step"] == pytest.approx(float(np.square(rounded - wanted).sum()), rel=0.7)


def test_heads_that_are_viewed_as_one_row_keep_their_strides():
    class Attention(nn.Module):
        def forward(self, x):
            # [1, 64] -> [1, 2 heads, 4 tokens, 8], as encoders of transformers write it
            heads = x.reshape(1, 4, 2, 8).transpose(1, 2)
            mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads)
            return mixed.transpose(1, 2).reshape(1, 4, -1)

    snr, _ = own(program_of(Attention()), UNIT["f32"], np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32))
    assert snr > 100


def test_it_moves_the_same_way_twice():
    program = program_of(nn.Linear(64, 32))
    x = np.ones((1, 64), np.float32)
    one, other = (Trembling(program).run({"x": x}, UNIT["f16"])[0]["output"] for _ in range(2))
    assert np.array_equal(one, other)


def test_squares_on_the_way_to_a_norm_are_not_the_peak():
    class Norm(nn.Module):
        def forward(self, x):
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() + 0 * x

    x = np.full((1, 64), 3000, np.float32)
    assert own(program_of(Norm()), UNIT["f16"], x)[1].value < 65504


def test_a_product_beyond_half_precision_is_named():
    class Large(nn.Module):
        def forward(self, x):
            return (x * 100).tanh()

    peak = own(program_of(Large()), UNIT["f16"], np.full((1, 64), 3000, np.float32))[1]
    assert peak.operator == "mul"
    assert peak.value == pytest.approx(3e5, rel=0.01)


def test_inputs_beyond_a_grid_are_named():
    import dataclasses

    from edgeship.core.weights import ActivationEncoding

    program = program_of(nn.Sequential(nn.Linear(64, 32), nn.ReLU()))
    name = program.exported.graph_signature.user_inputs[0]
    record = dataclasses.replace(program.record, activations={name: ActivationEncoding(8, 4 / 127, 0)})
    static = dataclasses.replace(program, record=record)
    x = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    assert Saturation(static).beyond({"x": x}) == ""
    assert Saturation(static).beyond({"x": 100 * x}).startswith(f"{name} reaches ")


def test_another_draw_moves_otherwise_by_about_as_much():
    program = program_of(nn.Linear(64, 32))
    x = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    plain = program.module()(torch.from_numpy(x))[0].detach().numpy()
    one, other = (Trembling(program).run({"x": x}, UNIT["f16"], seed=seed)[0]["output"] for seed in (0, 1))
    assert not np.array_equal(one, other)
    assert 0.2 < np.abs(one - plain).mean() / np.abs(other - plain).mean() < 5


def test_values_keep_their_place_in_memory():
    """What heads of attention give is transposed back and viewed: a copy in another order could not be."""

    class Heads(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = (x.view(1, 6, 4, 8).transpose(1, 2) * 2).relu()
            return heads.transpose(1, 2).view(1, 6, 32)

    program = make_program(Heads().eval(), [TensorSpec("x", "f32", (1, 6, 32))], [torch.randn(1, 6, 32)])
    assert any(node.target is torch.ops.aten.view.default for node in program.exported.graph.nodes)
    x = np.random.default_rng(0).standard_normal((1, 6, 32)).astype(np.float32)
    found, _ = Trembling(program).run({"x": x}, UNIT["f16"])
    (name,) = found
    wanted = np.maximum(2 * x, 0)
    assert np.abs(found[name] - wanted).max() < 0.01 * np.abs(wanted).max()
