"""Pads become the padding of the convolutions behind them, with the same answers, wherever torch can say them."""

import itertools

import torch
from torch import nn
from torch.nn import functional

from edgeship.core.model import TensorSpec
from edgeship.program.export import make_program


class Padded(nn.Module):
    def __init__(self, ends, own=0, kernel=3, stride=1, dilation=1, rank=2, channels=4, **filling):
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.conv = convolution(channels, 4, kernel, stride, own, dilation)
        self.ends, self.filling = ends, filling

    def forward(self, x):
        return self.conv(functional.pad(x, self.ends, **self.filling))


class Side(nn.Module):
    """Layers that read the same input, each with an output of its own."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return tuple(layer(x) for layer in self.layers)


def pads_left(layers, shape):
    """Whether a pad is left before each layer's convolution; the answers are the module's."""
    torch.manual_seed(0)
    model, x = Side(layers).eval(), torch.randn(shape)
    program = make_program(model, [TensorSpec("x", "f32", shape)], [x])
    with torch.no_grad():
        for found, wanted in zip(program.module()(x), model(x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for node in program.exported.graph.nodes:
        if ".conv" in str(node.target):
            assert all(len(option) == len(shape) - 2 for option in node.args[3:6])
    (end,) = (node for node in program.exported.graph.nodes if node.op == "output")
    return [str(layer.args[0].target).startswith(("aten.pad", "aten.constant_pad")) for layer in end.args[0]]


def test_equal_ends_fold_whatever_the_convolution_is():
    grid = itertools.product((2, 3, 5), (1, 2, 3), (1, 2))
    layers = [Padded((1, 1, 2, 2), 1, kernel, stride, dilation) for kernel, stride, dilation in grid]
    assert not any(pads_left(layers, (1, 4, 11, 12)))
    assert not any(pads_left([Padded((2, 2), rank=1, own=1)], (2, 4, 9)))
    assert not any(pads_left([Padded((1,) * 6, rank=3)], (1, 4, 4, 4, 4)))


def test_unequal_ends_fold_where_the_end_is_not_read():
    for size in (8, 9, 10, 11):
        grid = list(itertools.product((0, 1, 2), (0, 1, 2), (1, 2)))
        left = pads_left([Padded((start, end), stride=stride, rank=1) for start, end, stride in grid], (2, 4, size))
        counts = [((size + 2 * a - 3) // step, (size + a + b - 3) // step) for a, b, step in grid]
        assert left == [even != odd for even, odd in counts]
        assert {True, False} == set(left)


def test_what_is_no_frame_of_zeros_stays():
    layers = [
        Padded((1,) * 6, channels=6),  # channels too
        Padded((-1, 1, 0, 0)),
        Padded((1,) * 4, value=1.0),
        Padded((1,) * 4, mode="reflect"),
    ]
    assert all(pads_left(layers, (1, 4, 5, 5)))


def test_a_pad_with_other_readers_stays_for_them_and_pads_in_a_row_fold_together():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x):
            padded = functional.pad(x, (1, 1, 1, 1))
            return self.two(functional.pad(functional.pad(self.one(padded), (1, 1)), (0, 0, 2, 2))), padded

    torch.manual_seed(0)
    model, x = Both().eval(), torch.randn(1, 2, 4, 4)
    program = make_program(model, [TensorSpec("x", "f32", (1, 2, 4, 4))], [x])
    with torch.no_grad():
        for found, wanted in zip(program.module()(x), model(x), strict=True):
            torch.testing.assert_close(found, wanted)
    found = [list(node.args[4]) for node in program.exported.graph.nodes if "conv2d" in str(node.target)]
    assert found == [[1, 1], [2, 1]]
