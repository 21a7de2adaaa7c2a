"""Points in images and volumes answer as torch's own operator does."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from edgeship.program.sampling import affine_grid, grid_sampler

MODES = ("bilinear", "nearest")
EDGES = ("zeros", "border", "reflection")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=3),
    st.sampled_from(MODES),
    st.sampled_from(EDGES),
    st.booleans(),
    st.integers(0, 99),
)
def test_points_of_images_and_volumes(sizes, mode, edge, corners, seed):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, *sizes, generator=draws)
    # Far outside, too; halves between elements are left to chance.
    grid = torch.randn(2, *[size + 1 for size in sizes], len(sizes), generator=draws) * 1.5
    wanted = functional.grid_sample(x, grid, mode=mode, padding_mode=edge, align_corners=corners)
    found = grid_sampler(x, grid, MODES.index(mode), EDGES.index(edge), corners)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(2, 5), min_size=2, max_size=3), st.booleans())
def test_points_that_a_matrix_moves(sizes, corners):
    size = [2, 3, *sizes]
    theta = torch.randn(2, len(sizes), len(sizes) + 1)
    wanted = functional.affine_grid(theta, size, align_corners=corners)
    torch.testing.assert_close(affine_grid(theta, size, corners), wanted)
