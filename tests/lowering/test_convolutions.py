"""Convolutions written as others, against torch's, over the arguments that make them differ."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeship.lowering.convolutions import PLAIN, TRANSPOSED, convolution_by_depth, transposed_convolution


@st.composite
def convolutions(draw, ranks=(1, 2, 3)):
    """(rank, groups, sizes, kernel, stride, padding, output padding, dilation): lists, one number an axis."""
    rank, groups = draw(st.sampled_from(ranks)), draw(st.sampled_from([1, 2, 3]))
    columns = []
    for _ in range(rank):
        stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        spare = draw(st.integers(0, max(stride, dilation) - 1))
        columns.append(
            (draw(st.integers(1, 6)), draw(st.integers(1, 4)), stride, draw(st.integers(0, 3)), spare, dilation)
        )
    return (rank, groups, *map(list, zip(*columns, strict=True)))


@settings(max_examples=100, deadline=None)
@given(convolutions(), st.booleans(), st.integers(0, 99))
def test_transposed_in_every_form(case, biased, seed) -> None:
    rank, groups, sizes, kernel, stride, padding, spare, dilation = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 2 * groups, *sizes, generator=generator)
    weight = torch.randn(2 * groups, 3, *kernel, generator=generator)
    bias = torch.randn(3 * groups, generator=generator) if biased else None
    given = (x, weight, bias, stride, padding, spare, groups, dilation)
    try:
        wanted = TRANSPOSED[rank - 1](*given)
    except RuntimeError:
        # Padding that leaves nothing.
        return
    for form in ({}, {"grouped": True}, {"dilated": True}, {"grouped": True, "dilated": True}, {"spread": True}):
        found = transposed_convolution(*given, **form)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=f"{case} {form}")


@settings(max_examples=66, deadline=None)
@given(convolutions(ranks=(3,)), st.booleans(), st.integers(0, 99))
def test_room_as_planes(case, biased, seed) -> None:
    _, groups, sizes, kernel, stride, padding, _, dilation = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 2 * groups, *sizes, generator=generator)
    weight = torch.randn(3 * groups, 2, *kernel, generator=generator)
    bias = torch.randn(3 * groups, generator=generator) if biased else None
    given = (x, weight, bias, stride, padding, dilation, groups)
    try:
        wanted = PLAIN[2](*given)
    except RuntimeError:
        return
    found = convolution_by_depth(*given)
    assert (found is NotImplemented) is (groups == 1 and max(dilation) == 1)
    if found is not NotImplemented:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_one_number_stands_for_every_axis(rank) -> None:
    x, weight = torch.randn(1, 4, *[5] * rank), torch.randn(4, 3, *[3] * rank)
    given = ([2], [1], [1], 2, [2])
    found = transposed_convolution(x, weight, None, *given)
    torch.testing.assert_close(found, TRANSPOSED[rank - 1](x, weight, None, 2, 1, 1, 2, 2), rtol=1e-4, atol=1e-4)
