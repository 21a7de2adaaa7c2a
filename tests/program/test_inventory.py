"""What a program holds and costs, by arithmetic that can be checked by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeship.core.model import TensorSpec
from edgeship.program.export import make_program


class Calls(nn.Module):
    def __init__(self, function, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.function = function

    def forward(self, x):
        return self.function(x, *self.layers)


def inventory(function, shape, *layers, dtype="f32"):
    x = torch.zeros(shape, dtype=torch.int64) if dtype == "i64" else torch.randn(shape)
    return make_program(Calls(function, *layers), [TensorSpec("x", dtype, shape)], [x]).record.inventory


@pytest.mark.parametrize(
    ("function", "shape", "layers", "macs"),
    [
        (lambda x, f: f(x), (2, 8), (nn.Linear(8, 4),), 2 * 8 * 4),
        (lambda x, f: f(x), (1, 3, 8, 8), (nn.Conv2d(3, 4, 3, padding=1),), 64 * 4 * 27),
        (lambda x, f: f(x), (1, 3, 8, 8), (nn.Conv2d(3, 4, 3, stride=2),), 9 * 4 * 27),
        (lambda x, f: f(x), (1, 4, 8, 8), (nn.Conv2d(4, 4, 3, groups=4),), 36 * 4 * 9),
        (lambda x, f: f(x), (1, 4, 8, 8), (nn.Conv2d(4, 6, 1, groups=2),), 64 * 6 * 2),
        (lambda x, f: f(x), (1, 3, 10), (nn.Conv1d(3, 4, 3),), 8 * 4 * 9),
        (lambda x, f: f(x), (1, 3, 4, 4), (nn.ConvTranspose2d(3, 5, 2, 2),), 3 * 16 * 5 * 4),
        (lambda x: x @ x.transpose(1, 2), (2, 3, 5), (), 2 * 3 * 3 * 5),
        (lambda x: torch.bmm(x, x), (2, 3, 3), (), 2 * 3 * 3 * 3),
        (lambda x: functional.scaled_dot_product_attention(x, x, x), (1, 2, 4, 8), (), 2 * (2 * 4 * 4 * 8)),
        (lambda x: torch.relu(x) + 1, (4, 4), (), 0),
        (lambda x, f: f(x)[0], (1, 7, 8), (nn.LSTM(8, 6, batch_first=True),), 7 * 4 * 6 * (8 + 6)),
        (lambda x, f: f(x)[0], (7, 2, 8), (nn.GRU(8, 6, bidirectional=True),), 7 * 2 * 2 * 3 * 6 * (8 + 6)),
        (lambda x, f: f(x)[0], (7, 1, 8), (nn.RNN(8, 6),), 7 * 6 * (8 + 6)),
    ],
)
def test_multiply_accumulates(function, shape, layers, macs):
    assert inventory(function, shape, *layers).macs == macs


@pytest.mark.parametrize(
    ("function", "shape", "layer", "op", "axis"),
    [
        (lambda x, f: f(x), (2, 8), nn.Linear(8, 4), "linear", 0),
        (lambda x, f: f(x), (1, 3, 8, 8), nn.Conv2d(3, 4, 3), "conv", 0),
        (lambda x, f: f(x), (1, 4, 8, 8), nn.Conv2d(4, 8, 3, groups=4), "depthwise_conv", 0),
        (lambda x, f: f(x), (1, 4, 8, 8), nn.Conv2d(4, 8, 3, groups=2), "conv", 0),
        (lambda x, f: f(x), (1, 3, 4, 4), nn.ConvTranspose2d(3, 5, 2), "conv_transpose", 1),
        (lambda x, f: f(x) * f.weight.sum(), (2, 8), nn.Linear(8, 4), "other", 0),
    ],
)
def test_weights_by_use(function, shape, layer, op, axis):
    use = inventory(function, shape, layer).weight("layers.0.weight")
    assert (use.op, use.channel_axis, use.shape) == (op, axis, tuple(layer.weight.shape))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights(kind):
    found = inventory(lambda x, f: f(x)[0], (5, 1, 8), kind(8, 6, bidirectional=True))
    uses = {use.name.removeprefix("layers.0."): use.op for use in found.weights if use.name.startswith("layers")}
    assert {name for name, op in uses.items() if op == "recurrent"} == {
        "weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse",
    }  # fmt: skip
    assert all(op == "other" for name, op in uses.items() if name.startswith("bias"))


def test_an_embedding_and_the_linear_tied_to_it():
    table = nn.Embedding(10, 4)
    plain = inventory(lambda x, f: f(x), (1, 3), table, dtype="i64")
    assert plain.weight("layers.0.weight").op == "embedding"
    tied = inventory(lambda x, f: functional.linear(f(x), f.weight), (1, 3), table, dtype="i64")
    assert tied.weight("layers.0.weight").op == "linear"


def test_biases_and_norms_stay_as_they_are():
    found = inventory(lambda x, f, g: g(f(x)), (2, 8), nn.Linear(8, 4), nn.LayerNorm(4))
    assert {use.name: use.op for use in found.weights} == {
        "layers.0.weight": "linear", "layers.0.bias": "other", "layers.1.weight": "other", "layers.1.bias": "other",
    }  # fmt: skip
    assert found.parameters == 32 + 4 + 4 + 4


def test_the_peak_of_live_activations():
    # relu makes 16, doubled 16, and both live while they are added to 16 more.
    found = inventory(lambda x: torch.relu(x) + torch.relu(x) * 2, (4, 4))
    assert 32 <= found.peak_activation_elements <= 48
    chain = inventory(lambda x: torch.sigmoid(torch.tanh(torch.relu(x))), (4, 4))
    assert chain.peak_activation_elements == 32
    views = inventory(lambda x: torch.relu(x).reshape(2, 8).transpose(0, 1), (4, 4))
    assert views.peak_activation_elements == 16


def test_operators_name_the_weights_they_read():
    found = inventory(lambda x, f: f(x), (2, 8), nn.Linear(8, 4))
    (op,) = found.ops
    assert set(op.weights) == {"layers.0.weight", "layers.0.bias"}
    assert (op.elements_in, op.elements_out) == (16, 8)


def test_masks_and_indices_take_their_own_bytes_and_floats_those_of_the_arithmetic():
    mask, order = torch.arange(8) % 3 > 0, torch.arange(8).flip(0)
    found = inventory(lambda x, f: torch.where(mask & (x > 0), f(x), x)[:, order], (1, 8), nn.Linear(8, 8))
    bits = {
        use.plain_bits: (use.bits_unencoded(halves=False), use.bits_unencoded(halves=True)) for use in found.weights
    }
    assert bits == {0: (32, 16), 8: (8, 8), 64: (64, 32)}
