"""A tensor that no artifact could hold is refused before it is made."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgeship.core.model import TensorSpec
from edgeship.errors import LimitError
from edgeship.program.export import make_program
from edgeship.program.sizes import guarded_sizes

X = torch.ones(1, 4)
LARGE = {
    "full": lambda: torch.full((10**5, 10**5), 1.0),
    "zeros": lambda: torch.zeros(10**5, 10**5),
    "arange": lambda: torch.arange(10**10),
    "repeat": lambda: X.repeat(10**5, 10**5),
    "outer": lambda: torch.outer(torch.ones(10**5), torch.ones(10**5)),
    "product": lambda: torch.ones(10**5, 1) @ torch.ones(1, 10**5),
    "broadcast": lambda: torch.ones(10**5, 1) + torch.ones(1, 10**5),
    "pad": lambda: nn.functional.pad(X, (0, 10**10)),
    "resize": lambda: nn.functional.interpolate(X[None, None], scale_factor=10**5),
    "one hot": lambda: nn.functional.one_hot(torch.arange(10**5), 10**6),
    "expanded and computed": lambda: X.expand(10**9, 4) * 2,
    "eye": lambda: torch.eye(10**6),
}


@pytest.mark.parametrize("name", LARGE)
def test_it_is_refused(name):
    with guarded_sizes("here"), pytest.raises(LimitError, match="makes a tensor of shape"):
        LARGE[name]()


def test_what_is_large_already_may_be_looked_at():
    wide = torch.ones(1).expand(10**10)
    with guarded_sizes():
        assert wide[:5].sum() == 5
        assert wide.view(10**5, 10**5).t().shape == (10**5, 10**5)
        assert float(X.sum()) == 4
        assert torch.nonzero(X).shape == (4, 2)


def test_a_model_that_grows_is_refused():
    class Grows(nn.Module):
        def forward(self, x):
            return (x.repeat(10**6, 10**4) * 2).mean()

    with pytest.raises(LimitError):
        make_program(Grows(), [TensorSpec("x", "f32", (1, 4))], [X])


def test_a_model_of_too_many_layers_is_refused():
    model = nn.Sequential(*[nn.Identity() for _ in range(60_000)])
    with pytest.raises(LimitError, match="60001 layers"):
        make_program(model, [TensorSpec("x", "f32", (1, 4))], [X])
