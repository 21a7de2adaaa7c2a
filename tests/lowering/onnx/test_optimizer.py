"""The optimizer changes no number: programs with constants near 0 and 1 answer as torch does, on small inputs too."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from edgeship.core.model import TensorSpec
from edgeship.lowering.onnx.optimizer import compares_nearly, exact_rules
from edgeship.program.export import make_program
from edgeship.runtimes.onnxruntime import RUNTIME

SMALL = [1e-10, -1e-9, 3e-9, 1e-7]
NEAR = [1.000008, 0.999992]


class Near(nn.Module):
    def forward(self, x):
        sums = [x + small for small in SMALL] + [small + x for small in SMALL] + [x - small for small in SMALL]
        factors = [x * near for near in NEAR] + [x / near for near in NEAR] + [x**near for near in NEAR]
        others = [torch.where(x > 1e-9, x, 1e-9), functional.pad(x, (1, 1), value=1e-9), x.clamp(1e-10, 1.000001)]
        return *sums, *factors, *others, torch.maximum(x, torch.tensor(1e-10)), torch.log(x + 1e-10)


def run(artifact, x):
    with RUNTIME.open(artifact) as session:
        return list(session.run({"x": x}).values())


def test_constants_near_zero_and_one_stay(lower_to_onnx):
    artifact = lower_to_onnx(make_program(Near(), [TensorSpec("x", "f32", (2, 6))], [torch.rand(2, 6)]))
    for x in (torch.zeros(2, 6), torch.full((2, 6), 1e-9), torch.rand(2, 6), torch.rand(2, 6) * 1e-9, torch.ones(2, 6)):
        for place, (want, have) in enumerate(zip(Near()(x), run(artifact, x.numpy()), strict=True)):
            np.testing.assert_allclose(have, want.numpy(), rtol=3e-6, atol=1e-16, err_msg=str(place))


def test_no_rule_matches_with_a_tolerance():
    from onnxscript.rewriter import _DEFAULT_REWRITE_RULES

    assert any(compares_nearly(rule) for rule in _DEFAULT_REWRITE_RULES)
    assert not any(compares_nearly(rule) for rule in exact_rules())


@settings(max_examples=6, deadline=None)
@given(groups=st.sampled_from([1, 2, 6]), sizes=st.sampled_from([(5,), (4, 4)]), affine=st.booleans())
def test_group_norms_on_a_large_mean(groups, sizes, affine, lower_to_onnx):
    torch.manual_seed(0)
    norm, shape = nn.GroupNorm(groups, 6, affine=affine), (1, 6, *sizes)
    if affine:
        norm.weight.data.uniform_(0.5, 2)
        norm.bias.data.uniform_(-1, 1)
    artifact = lower_to_onnx(make_program(norm, [TensorSpec("x", "f32", shape)], [torch.randn(shape)]))
    flat, narrow = torch.full(shape, 100.0), 100 + 0.1 * torch.randn(shape)
    for x in (flat, narrow, 0 * flat, 1e-3 * torch.randn(shape), 1e3 * torch.randn(shape)):
        want = norm(x).detach().numpy()
        np.testing.assert_allclose(run(artifact, x.numpy())[0], want, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("dilation", [1, 2])
def test_transposed_convolutions(dilation, lower_to_onnx):
    layer, x = nn.ConvTranspose2d(6, 4, 2, (2, 1), dilation=dilation, groups=2), torch.randn(1, 6, 5, 7)
    artifact = lower_to_onnx(make_program(layer, [TensorSpec("x", "f32", (1, 6, 5, 7))], [x]))
    np.testing.assert_allclose(run(artifact, x.numpy())[0], layer(x).detach().numpy(), rtol=1e-4, atol=1e-5)
