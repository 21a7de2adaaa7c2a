"""Rewrites of single operators against torch's own, over the arguments that make them differ."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeship.lowering.operators import index_copy, on_masks, ordered, product, remainder, scatter_add, variance


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_index_copy(dim: int) -> None:
    x = torch.randn(6, 5, 4)
    index = torch.tensor([3, 1])
    source = torch.randn([2 if axis == dim % 3 else size for axis, size in enumerate(x.shape)])
    torch.testing.assert_close(index_copy(x, dim % 3, index, source), x.index_copy(dim % 3, index, source))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2), st.lists(st.integers(1, 4), min_size=3, max_size=3), st.integers(1, 5), st.integers(0, 99))
def test_scatter_add(dim, sizes, count, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sizes, generator=generator)
    named = [count if axis == dim else size for axis, size in enumerate(sizes)]
    index = torch.randint(0, sizes[dim], named, generator=generator)
    source = torch.randn([size + 1 for size in named], generator=generator)
    torch.testing.assert_close(scatter_add(x, dim, index, source), x.scatter_add(dim, index, source))


def test_on_masks_leaves_integers_alone() -> None:
    both = on_masks(torch.logical_and)
    assert both(torch.tensor([6]), torch.tensor([3])) is NotImplemented
    assert both(torch.tensor([True]), torch.tensor([False])).item() is False


def test_product_variance_remainder_and_order() -> None:
    x = torch.randn(3, 5)
    torch.testing.assert_close(product(x, 1, keepdim=True), x.prod(1, keepdim=True))
    assert product(torch.ones(2, 100), 1) is NotImplemented
    torch.testing.assert_close(variance(x, [-1], correction=1.0), x.var(-1))
    torch.testing.assert_close(variance(x, None, correction=0.0), x.var(correction=0))
    torch.testing.assert_close(remainder(x, 0.7), x.remainder(0.7))
    whole = torch.arange(-5, 5)
    assert torch.equal(remainder(whole, 3), whole.remainder(3))
    for descending in (True, False):
        values, indices = ordered(x, 1, descending)
        assert torch.equal(values, x.sort(1, descending).values)
        assert torch.equal(x.gather(1, indices), values)
