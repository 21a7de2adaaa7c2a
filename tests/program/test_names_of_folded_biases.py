"""Biases that folding makes get names of their own, whatever the weights are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgeship.core.model import TensorSpec
from edgeship.program.export import make_program


class _Numbered(nn.Module):
    """Two convolutions whose weights lie beside each other, ``held.0`` and ``held.1``, as in files of other makers."""

    def __init__(self, *, transposed: bool, biased: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.held = nn.ParameterList(
            [nn.Parameter(torch.randn(6, 6, 2, 2)), nn.Parameter(torch.randn(6, 6 if biased else 1, 2, 2))]
        )
        if not transposed and not biased:
            self.held[1] = nn.Parameter(torch.randn(1, 6, 2, 2))
        self.bias = nn.Parameter(torch.randn(6)) if biased else None
        self.first, self.second = nn.BatchNorm2d(6).eval(), nn.BatchNorm2d(6 if biased else 1).eval()
        for norm in (self.first, self.second):
            norm.running_mean.normal_()  # type: ignore[union-attr]
        self.run = torch.conv_transpose2d if transposed else torch.conv2d

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(1, 6, 8, 8)``; both convolutions share their bias where they have one."""
        x = self.first(self.run(x, self.held[0], self.bias)).relu()
        x = self.run(x, self.held[1], self.bias)
        return self.second(x) + 0.25


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_two_layers_of_one_folder_keep_their_own_biases(transposed: bool, biased: bool) -> None:
    model = _Numbered(transposed=transposed, biased=biased).eval()
    x = torch.randn(1, 6, 8, 8)
    program = make_program(model, [TensorSpec("x", "f32", (1, 6, 8, 8))], [x])
    torch.testing.assert_close(program.filled().module()(x)[0], model(x), rtol=1e-4, atol=1e-4)
