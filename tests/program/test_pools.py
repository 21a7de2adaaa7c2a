"""Pools in the normal form and in the converters' own forms, against torch's, over the arguments that make them differ."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from edgeship.core.model import TensorSpec
from edgeship.program.export import make_program
from edgeship.program.windows import (
    adaptive_windows,
    average_pool,
    dilated_maximum,
    divided_pool,
    largest_and_where,
    largest_of,
    max_windows,
    shared_out,
    whole_windows,
    window_shares,
)

AVERAGES = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)
LARGEST = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
ADAPTIVE = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d)
ADAPTIVE_LARGEST = (functional.adaptive_max_pool1d, functional.adaptive_max_pool2d, functional.adaptive_max_pool3d)


@st.composite
def pools(draw, holes=False):
    """(x, kernel, stride, padding, dilation, ceil) of one to three axes that torch takes."""
    rank = draw(st.integers(1, 3))
    sizes, kernel, stride, padding, dilation = [], [], [], [], []
    for _ in range(rank):
        kernel.append(draw(st.integers(1, 4)))
        stride.append(draw(st.integers(1, 4)))
        padding.append(draw(st.integers(0, kernel[-1] // 2)))
        dilation.append(draw(st.integers(1, 3)) if holes else 1)
        reach = dilation[-1] * (kernel[-1] - 1) + 1
        sizes.append(draw(st.integers(reach, reach + 6)))
    # Few values, so that windows hold equal ones.
    seed = draw(st.integers(0, 99))
    x = torch.randint(-3, 4, (1, 2, *sizes), generator=torch.Generator().manual_seed(seed)).float()
    return x, kernel, stride, padding, dilation, draw(st.booleans())


@settings(max_examples=100, deadline=None)
@given(pools(), st.booleans())
def test_averages_count_what_torch_counts(case, counted) -> None:
    x, kernel, stride, padding, _, ceil = case
    wanted = AVERAGES[len(kernel) - 1](x, kernel, stride, padding, ceil, counted)
    found = average_pool(x, kernel, stride, padding, ceil, counted)
    if found is NotImplemented:
        assert not ceil
        assert counted or not any(padding)
        return
    torch.testing.assert_close(found, wanted)


@settings(max_examples=50, deadline=None)
@given(pools(), st.booleans(), st.integers(1, 9))
def test_averages_with_a_divisor_of_their_own(case, counted, divisor) -> None:
    x, kernel, stride, padding, _, ceil = case
    if len(kernel) == 1:
        return
    wanted = AVERAGES[len(kernel) - 1](x, kernel, stride, padding, ceil, counted, divisor)
    torch.testing.assert_close(divided_pool(x, kernel, stride, padding, ceil, counted, divisor), wanted)
    found = average_pool(x, kernel, stride, padding, ceil, counted, divisor)
    assert (found is NotImplemented) is (not ceil)
    if found is not NotImplemented:
        torch.testing.assert_close(found, wanted)


@settings(max_examples=100, deadline=None)
@given(pools(holes=True))
def test_maxima_and_their_places(case) -> None:
    x, kernel, stride, padding, dilation, ceil = case
    wanted, places = LARGEST[len(kernel) - 1](x, kernel, stride, padding, dilation, ceil, return_indices=True)
    tables = [list(table.t()) for table in max_windows(x.shape[2:], kernel, stride, padding, dilation, ceil)]
    assert torch.equal(largest_of(x, tables), wanted)
    found, where = largest_and_where(x, tables)
    assert torch.equal(found, wanted)
    assert torch.equal(where, places)
    with_holes = dilated_maximum(x, kernel, stride, padding, dilation, ceil)
    assert (with_holes is NotImplemented) is all(hole == 1 for hole in dilation)
    assert with_holes is NotImplemented or torch.equal(with_holes, wanted)


@settings(max_examples=66, deadline=None)
@given(pools())
def test_maxima_past_the_end(case) -> None:
    x, kernel, stride, padding, _, ceil = case
    rank = len(kernel)
    found = whole_windows(x, kernel, stride, padding, [1] * rank, ceil)
    if found is NotImplemented:
        # Then the mode makes no difference.
        found = LARGEST[rank - 1](x, kernel, stride, padding)
    assert torch.equal(found, LARGEST[rank - 1](x, kernel, stride, padding, ceil_mode=ceil))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3), st.integers(0, 99))
def test_windows_of_unequal_size(axes, seed) -> None:
    sizes, wanted = [size for size, _ in axes], [count for _, count in axes]
    x = torch.randint(-3, 4, (2, 3, *sizes), generator=torch.Generator().manual_seed(seed)).float()
    tables = [adaptive_windows(size, count) for size, count in axes]
    shares = [window_shares(table, size) for table, size in zip(tables, sizes, strict=True)]
    torch.testing.assert_close(shared_out(x, shares), ADAPTIVE[len(axes) - 1](x, wanted))
    values, places = ADAPTIVE_LARGEST[len(axes) - 1](x, wanted, return_indices=True)
    found, where = largest_and_where(x, [list(table.t()) for table in tables])
    assert torch.equal(found, values)
    assert torch.equal(where, places)


class Pooled(torch.nn.Module):
    """All that `pool_plainly` writes otherwise."""

    def forward(self, plane, room):
        values, places = functional.max_pool2d(plane, 3, 2, 1, return_indices=True)
        return (
            values,
            places,
            functional.max_pool2d(plane, 2, return_indices=True)[0],
            functional.adaptive_max_pool2d(plane, (3, 4)),
            functional.adaptive_max_pool2d(plane, (4, 3)),
            functional.adaptive_max_pool2d(plane, (4, 3), return_indices=True)[1],
            functional.adaptive_max_pool1d(plane[0], 5),
            functional.adaptive_avg_pool3d(room, (2, 3, 1)),
            functional.adaptive_avg_pool3d(room, (3, 2, 4)),
            functional.adaptive_avg_pool3d(room, 1),
            functional.avg_pool2d(plane, 3, 2, 1, ceil_mode=True, divisor_override=4),
        )


def test_the_normal_form_has_none_of_them() -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(1, 2, 8, 9), torch.randn(1, 2, 4, 6, 5))
    specs = [TensorSpec(name, "f32", tuple(value.shape)) for name, value in zip("xy", inputs, strict=True)]
    program = make_program(Pooled(), specs, inputs)
    targets = {str(node.target) for node in program.exported.graph.nodes}
    assert not [name for name in targets if "adaptive" in name or "indices" in name]
    for found, wanted in zip(program.module()(*inputs), Pooled()(*inputs), strict=True):
        torch.testing.assert_close(found, wanted, check_dtype=False)


@pytest.mark.parametrize(("size", "kernel", "stride"), itertools.product((7, 8), (2, 3), (1, 2, 3)))
def test_a_window_past_the_end_sees_its_last_row_again(size, kernel, stride) -> None:
    x = torch.randn(1, 2, size, size + 1)
    found = whole_windows(x, [kernel, kernel], [stride, stride], [0, 0], [1, 1], True)
    wanted = functional.max_pool2d(x, kernel, stride, ceil_mode=True)
    assert torch.equal(functional.max_pool2d(x, kernel, stride) if found is NotImplemented else found, wanted)


def test_a_pool_says_its_stride() -> None:
    class Left(torch.nn.Module):
        def forward(self, x):
            return functional.max_pool2d(x, 3, dilation=2), functional.avg_pool1d(x[0], 2), functional.max_pool2d(x, 2)

    x = torch.randn(1, 3, 16, 16)
    program = make_program(Left(), [TensorSpec("x", "f32", (1, 3, 16, 16))], [x])
    pools = [node for node in program.exported.graph.nodes if "pool" in str(node.target)]
    assert [list(node.args[2]) for node in pools] == [[3, 3], [2], [2, 2]]
    for found, wanted in zip(program.module()(x), Left()(x), strict=True):
        assert torch.equal(found, wanted)
