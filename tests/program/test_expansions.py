"""What is written out answers as torch's own operator, over a grid of shapes and options."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgeship.program.normalize import export_normalised

few = settings(max_examples=12, deadline=None)


class Call(nn.Module):
    """A function as a module that returns a flat tuple."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        result = self.function(*inputs)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def normal(function, *inputs):
    """The normal form's answers beside the function's, and the names of its operators."""
    module = Call(function)
    exported = export_normalised(module, inputs, tuple(f"x{place}" for place in range(len(inputs))))
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    return exported.module()(*inputs), module(*inputs), names


def alike(function, *inputs, without: str) -> None:
    found, wanted, names = normal(function, *inputs)
    assert not any(without in name for name in names)
    for have, want in zip(found, wanted, strict=True):
        assert have.dtype == want.dtype
        torch.testing.assert_close(have, want)


@few
@given(st.integers(1, 9), st.sampled_from((0, 1, -1)), st.sampled_from(("cumprod", "cummax", "cummin")))
def test_running_products_and_extremes(length, dim, name):
    x = torch.randint(-3, 4, (length, 3, length + 1)).float() * 0.5
    alike(lambda x: getattr(torch, name)(x, dim), x, without=name)


@few
@given(st.booleans(), st.booleans(), st.booleans(), st.integers(1, 7))
def test_places_in_sorted_rows(right, rows, small, count):
    ordered = torch.randint(-3, 4, (2, 3, 6) if rows else (6,)).float().sort(-1)[0]
    values = torch.randint(-4, 5, (2, 3, count)).float()
    alike(lambda o, v: torch.searchsorted(o, v, right=right, out_int32=small), ordered, values, without="searchsorted")


@few
@given(st.sampled_from((0.5, 1.0, 2.0, 3.0, float("inf"))), st.integers(1, 30), st.integers(1, 30))
def test_distances_of_rows(p, first, second):
    alike(lambda x, y: torch.cdist(x, y, p), torch.randn(2, first, 5), torch.randn(2, second, 5), without="cdist")


def test_distances_of_many_pairs_go_through_a_product(monkeypatch):
    monkeypatch.setattr("edgeship.program.expansions.MAX_PAIRED_ELEMENTS", 8)
    _, _, names = normal(torch.cdist, torch.randn(6, 5), torch.randn(7, 5))
    assert names & {"aten.mm.default", "aten.bmm.default", "aten.matmul.default"}
    alike(torch.cdist, torch.randn(6, 5), torch.randn(7, 5), without="cdist")


@few
@given(st.integers(1, 9), st.integers(1, 6), st.booleans(), st.sampled_from((0, -1)))
def test_middles(rows, columns, keepdim, dim):
    x = torch.randperm(rows * columns).reshape(rows, columns).float()
    alike(lambda x: torch.median(x, dim, keepdim), x, without="median")
    alike(lambda x: torch.kthvalue(x, 1, dim, keepdim), x, without="kthvalue")
    alike(torch.median, x, without="median")


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_lengths_neither_overflow_nor_vanish(scale):
    alike(torch.hypot, torch.randn(9) * scale, torch.randn(9) * scale, without="hypot")


@pytest.mark.parametrize("name", ["fmin", "fmax"])
def test_the_other_where_one_is_not_a_number(name):
    x, y = torch.tensor([1.0, float("nan"), 3.0, float("nan")]), torch.tensor([2.0, 5.0, float("nan"), float("nan")])
    found, (wanted,), _ = normal(getattr(torch, name), x, y)
    torch.testing.assert_close(found[0], wanted, equal_nan=True)


def test_of_two_branches_one_is_taken():
    layer = nn.Linear(3, 3)

    def call(x):
        return torch.cond(x.sum() > 0, layer, lambda y: y * 2, (x,))

    for x in (torch.ones(2, 3), -torch.ones(2, 3)):
        alike(call, x, without="cond")


def test_batches_of_a_function():
    alike(torch.vmap(lambda row: row * row.sum()), torch.randn(4, 3), without="batch_dim")


def test_elements_near_zero_vanish():
    alike(nn.Hardshrink(0.3), torch.linspace(-1, 1, 21), without="hardshrink")


@few
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_products_of_all_pairs(first, second):
    alike(torch.kron, torch.randn(first), torch.randn(second), without="kron")


@pytest.mark.parametrize("bias", [False, True])
def test_bilinear_layers(bias):
    layer = nn.Bilinear(3, 4, 5, bias=bias)
    with torch.no_grad():
        alike(layer, torch.randn(2, 6, 3), torch.randn(2, 6, 4), without="bilinear")


@few
@given(st.integers(1, 3), st.integers(1, 2), st.integers(0, 1), st.integers(1, 3), st.integers(0, 2))
def test_patches_are_added_up(kernel, dilation, padding, stride, extra):
    size = dilation * (kernel - 1) + 1 + 2 * stride + extra
    options = {"kernel_size": (kernel, kernel + 1), "dilation": dilation, "padding": padding, "stride": stride}
    patches = nn.functional.unfold(torch.randn(2, 3, size, size + dilation), **options)
    alike(nn.Fold((size, size + dilation), **options), patches, without="im")


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 2])
def test_bags_of_rows(mode, padding):
    bags = nn.EmbeddingBag(9, 4, mode=mode, padding_idx=padding)
    with torch.no_grad():
        alike(bags, torch.randint(0, 9, (3, 5)), without="embedding_bag")
        alike(bags, torch.tensor([1, 2, 2, 8, 5]), torch.tensor([0, 1, 3, 3]), without="embedding_bag")


def test_random_slopes_are_their_middle():
    alike(nn.RReLU(0.1, 0.4).eval(), torch.randn(4, 5), without="rrelu")


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_lstm_with_a_projection(bidirectional, bias, batch_first):
    layer = nn.LSTM(4, 6, 2, bias=bias, batch_first=batch_first, bidirectional=bidirectional, proj_size=3).eval()

    def call(x):
        answers, (hidden, cells) = layer(x)
        return answers, hidden, cells

    with torch.no_grad():
        alike(call, torch.randn(3, 5, 4), without="lstm")
