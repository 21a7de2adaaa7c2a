"""Rewrites of single operators against torch's own, over the arguments that make them differ."""

import itertools

import pytest
import torch
from torch.nn import functional

from edgeship.lowering.operators import average_pool, index_copy, on_masks, ordered, product, remainder, variance

POOLS = [
    (size, kernel, stride, pad, ceil, counted)
    for size, kernel, stride, pad, ceil, counted in itertools.product(
        (7, 8, 9, 10), (2, 3, 4), (1, 2, 3), (0, 1), (True, False), (True, False)
    )
    if pad <= kernel // 2
]


def test_average_pool_counts_what_torch_counts() -> None:
    rewritten = 0
    for size, kernel, stride, pad, ceil, counted in POOLS:
        x = torch.randn(1, 2, size, size + 1)
        found = average_pool(x, [kernel, kernel], [stride, stride], [pad, pad], ceil, counted)
        if found is NotImplemented:
            assert not ceil
            assert counted or not pad
            continue
        rewritten += 1
        wanted = functional.avg_pool2d(x, kernel, stride, pad, ceil, counted)
        torch.testing.assert_close(found, wanted, msg=f"{size} {kernel} {stride} {pad} {ceil} {counted}")
    assert rewritten > 80


def test_average_pool_with_a_divisor() -> None:
    x = torch.randn(1, 2, 7, 8)
    found = average_pool(x, [3, 3], [2, 2], [1, 1], True, True, 5)
    torch.testing.assert_close(found, functional.avg_pool2d(x, 3, 2, 1, True, True, 5))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_index_copy(dim: int) -> None:
    x = torch.randn(6, 5, 4)
    index = torch.tensor([3, 1])
    source = torch.randn([2 if axis == dim % 3 else size for axis, size in enumerate(x.shape)])
    torch.testing.assert_close(index_copy(x, dim % 3, index, source), x.index_copy(dim % 3, index, source))


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
