"""What a module computes is found by feeding it numbers: over grids of norms, rotations, masks and products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgeship.llm.modules import Experts, experts_of, is_product, make_plain
from edgeship.llm.probing import RootNorm, angles_of, random_tensor, root_norm_of, rotation_kinds, window_of


class Norm(nn.Module):
    """As a model's file may write it, under whatever name."""

    def __init__(self, width, epsilon, offset, weighted, told, slope=1.0):
        super().__init__()
        self.hidden, self.offset, self.slope = epsilon, offset, slope
        if told:
            self.eps = epsilon
        if weighted:
            self.weight = nn.Parameter(torch.zeros(()).expand(width), requires_grad=False)

    def forward(self, hidden_states):
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.hidden)
        return x * (self.offset + self.slope * self.weight) if hasattr(self, "weight") else x


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 70),
    epsilon=st.sampled_from([1e-8, 1e-6, 1e-5, 3e-5, 1e-3]),
    offset=st.sampled_from([0.0, 1.0]),
    weighted=st.booleans(),
    told=st.booleans(),
)
def test_norms_are_known_by_what_they_compute(width, epsilon, offset, weighted, told):
    found = root_norm_of(Norm(width, epsilon, offset, weighted, told))
    # A row of one number says nothing of epsilons that it does not tell.
    assert found is not None
    assert (found.offset, found.weighted) == (offset if weighted else 0.0, weighted)
    assert found.epsilon == pytest.approx(epsilon, rel=1e-4)


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(16),
        nn.Identity(),
        nn.SiLU(),
        nn.Dropout(0.0),
        nn.Linear(16, 16),
        Norm(16, 1e-6, 0.5, weighted=True, told=True),
        Norm(16, 1e-6, 1.0, weighted=True, told=True, slope=2.0),
        nn.Sequential(Norm(16, 1e-6, 0.0, weighted=True, told=True)),
    ],
)
def test_what_is_no_such_norm_is_left_alone(module):
    assert root_norm_of(module) is None


def test_a_norm_that_tells_another_epsilon_than_it_uses_is_not_taken():
    norm = Norm(16, 1e-3, 0.0, weighted=True, told=True)
    norm.eps = 1e-6
    assert root_norm_of(norm) is None


def test_a_norm_that_may_be_given_a_gate_too_is_not_taken():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x, gate=None):
            x = x if gate is None else x * nn.functional.silu(gate)
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    assert root_norm_of(Gated()) is None


def test_torchs_own_norm_is_one():
    assert root_norm_of(nn.RMSNorm(24, eps=1e-5)) == RootNorm(1e-5)
    assert root_norm_of(nn.RMSNorm(24, eps=1e-5, elementwise_affine=False)) == RootNorm(1e-5, weighted=False)


class Rotary(nn.Module):
    def __init__(self, width, base, scale, kinds=()):
        super().__init__()
        self.frequencies = nn.Buffer(base ** -(torch.arange(0, width, 2) / width))
        self.scale = scale
        if kinds:
            self.rope_type = dict.fromkeys(kinds, "default")

    def forward(self, x, position_ids):
        angles = position_ids[..., None] * self.frequencies
        angles = torch.cat([angles, angles], -1)
        return angles.cos() * self.scale, angles.sin() * self.scale


class ByLayer(Rotary):
    def forward(self, x, position_ids, layer_type):
        return super().forward(x, position_ids * (1 + list(self.rope_type).index(layer_type)))


@settings(max_examples=20, deadline=None)
@given(
    width=st.sampled_from([2, 8, 64]),
    base=st.sampled_from([1e2, 1e4, 1e6]),
    scale=st.sampled_from([1.0, 0.8, 1.3]),
    kinds=st.sampled_from([(), ("near", "far")]),
)
def test_rotations_are_known_by_what_they_answer(width, base, scale, kinds):
    module = ByLayer(width, base, scale, kinds) if kinds else Rotary(width, base, scale)
    assert rotation_kinds(module) == (list(kinds) or [None])
    cos, sin = angles_of(module, torch.tensor([3]), kinds[-1] if kinds else None)
    assert (cos.square() + sin.square()).sqrt().allclose(torch.tensor(scale))
    assert rotation_kinds(nn.Linear(4, 4)) == []


def test_what_answers_no_rotation_is_none():
    class Other(Rotary):
        def forward(self, x, position_ids):
            cos, sin = super().forward(x, position_ids)
            return cos, 2 * sin

    assert rotation_kinds(Other(8, 1e4, 1.0)) == []


@settings(max_examples=40, deadline=None)
@given(positions=st.integers(2, 300), window=st.one_of(st.none(), st.integers(1, 40)))
def test_windows_are_known_by_what_they_hide(positions, window):
    def hides(batch, head, query, key):
        seen = key <= query
        return seen if window is None else seen & (key > query - window)

    expected = None if window is None or window >= positions else window
    assert window_of(hides, positions) == (True, expected)


@pytest.mark.parametrize(
    "hides",
    [
        lambda b, h, query, key: query >= 0,
        lambda b, h, query, key: (key <= query) & (key // 5 == query // 5),
        lambda b, h, query, key: (key <= query) & ((key > query - 4) | (key == 0)),
        lambda b, h, query, key: (key <= query) & (query - key != 3),
    ],
    ids=["both ways", "chunks", "a window and the first", "a hole"],
)
def test_other_patterns_are_no_windows(hides):
    assert window_of(hides, 64) == (False, None)


class Turned(nn.Module):
    def __init__(self, inner, out, bias, turned, shift=0.0):
        super().__init__()
        self.turned, self.shift = turned, shift
        self.weight = nn.Parameter(torch.zeros(()).expand((inner, out) if turned else (out, inner)))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x):
        x = x @ (self.weight if self.turned else self.weight.T) + self.shift
        return x if self.bias is None else x + self.bias


@settings(max_examples=30, deadline=None)
@given(inner=st.sampled_from([3, 8, 16]), out=st.sampled_from([3, 8, 16]), bias=st.booleans(), turned=st.booleans())
def test_products_are_known_by_what_they_compute(inner, out, bias, turned):
    assert is_product(Turned(inner, out, bias, turned)) is turned
    assert is_product(Turned(inner, out, bias, turned, shift=1.0)) is None


def test_linear_layers_with_code_of_their_own_are_made_plain_ones():
    class Own(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    model = nn.Sequential(Own(8, 8), nn.Linear(8, 8))
    wanted = model(x := torch.randn(3, 8))
    assert make_plain(model) == {}
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert torch.allclose(model(x), wanted, atol=1e-6)


class Fused(nn.Module):
    """Experts in one tensor, used one after the other."""

    def __init__(self, count, width, inner, turned, bias, interleaved, extra=0.0):
        super().__init__()
        self.turned, self.interleaved, self.extra = turned, interleaved, extra
        self.act_fn = nn.SiLU()
        shape = (count, width, 2 * inner) if turned else (count, 2 * inner, width)
        self.gate_up_proj = nn.Parameter(random_tensor(shape).clone())
        self.down_proj = nn.Parameter(
            random_tensor((count, inner, width) if turned else (count, width, inner), seed=1).clone()
        )
        if bias:
            self.gate_up_proj_bias = nn.Parameter(torch.randn(count, 2 * inner))
            self.down_proj_bias = nn.Parameter(torch.randn(count, width))

    def _apply_gate(self, both):
        gate, up = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, -1)
        return self.act_fn(gate) * (up + self.extra)

    def forward(self, hidden, index, weights):
        answer = torch.zeros_like(hidden)
        for row in range(hidden.shape[0]):
            for expert, weight in zip(index[row], weights[row], strict=True):
                first, second = self.gate_up_proj[expert], self.down_proj[expert]
                both = hidden[row] @ (first if self.turned else first.T)
                both = both + self.gate_up_proj_bias[expert] if hasattr(self, "gate_up_proj_bias") else both
                one = self._apply_gate(both) @ (second if self.turned else second.T)
                one = one + self.down_proj_bias[expert] if hasattr(self, "down_proj_bias") else one
                answer[row] += weight * one
        return answer


@settings(max_examples=20, deadline=None)
@given(
    turned=st.booleans(), bias=st.booleans(), interleaved=st.booleans(), extra=st.sampled_from([0.0, 1.0]),
    width=st.sampled_from([4, 6]),
)  # fmt: skip
def test_experts_are_taken_apart_however_they_lie(turned, bias, interleaved, extra, width):
    fused = Fused(3, width, 4, turned, bias, interleaved, extra)
    apart = experts_of(fused)
    assert apart is not None
    hidden, index = torch.randn(5, width), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]])
    weights = torch.rand(5, 2)
    assert torch.allclose(apart(hidden, index, weights), fused(hidden, index, weights), atol=1e-3, rtol=1e-4)


def test_experts_that_do_more_stay_as_they_are():
    class More(Fused):
        def forward(self, hidden, index, weights):
            return super().forward(hidden, index, weights).tanh()

    model = nn.Module()
    model.experts = More(2, 4, 4, turned=False, bias=False, interleaved=False)
    assert make_plain(model) == {}
    assert not isinstance(model.experts, Experts)
