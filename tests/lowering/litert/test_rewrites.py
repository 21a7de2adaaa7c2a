"""What the LiteRT converter gets wrong without a word, or lacks: rewritten it computes what torch computes."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeship.core.model import TensorSpec
from edgeship.program.export import make_program
from edgeship.runtimes.litert.runtime import RUNTIME

TOP = torch.linspace(1, 9, 6).reshape(1, 6, 1, 1)


def many(*layers):
    return nn.ModuleList(layers)


class Sides(nn.Module):
    """Constants on the left of a difference or quotient, where the converter moves transposes about."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        pooled = functional.max_pool2d(x, 3, 1, 1)
        return (
            TOP - pooled,
            3 - pooled,
            TOP / (pooled + 20),
            2 / (pooled + 20),
            self.conv(2 - x),
            TOP - self.conv(x).relu(),
        )


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = many(
            nn.ConvTranspose2d(6, 9, 3, stride=2, output_padding=1),
            nn.ConvTranspose2d(6, 9, 4, stride=3, padding=1, groups=3),
            nn.ConvTranspose2d(6, 4, (2, 3), stride=(2, 1), dilation=2, groups=2, bias=False),
            nn.ConvTranspose2d(6, 4, 2, stride=3, output_padding=2),
        )

    def forward(self, x):
        return tuple(layer(x) for layer in self.layers)


class Sums(nn.Module):
    """Values that are added at places, some of them named twice."""

    def forward(self, x):
        rows, columns = torch.tensor([0, 5, 0]), torch.tensor([1, 1, 1])
        return torch.zeros(6, 5, 7).index_put((rows, columns), x[0, :3, 0], accumulate=True) + x[0]


@pytest.mark.parametrize("kind", [Sides, Transposed, Sums])
def test_computes_what_torch_computes(kind, lower_to_tflite):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(1, 6, 5, 7)
    artifact = lower_to_tflite(make_program(model, [TensorSpec("x", "f32", tuple(x.shape))], [x]))
    with RUNTIME.open(artifact) as session:
        found = list(session.run({"x": x.numpy()}).values())
    wanted = model(x)
    for want, have in zip(wanted if isinstance(wanted, tuple) else [wanted], found, strict=True):
        np.testing.assert_allclose(have, want.detach().numpy(), rtol=1e-4, atol=1e-5)
