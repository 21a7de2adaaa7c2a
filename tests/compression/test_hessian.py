import pytest
import torch
from torch.nn import functional

from edgeship.compression import hessian as module
from edgeship.compression.hessian import hessian_of, hessian_of_conv


@pytest.fixture
def inputs():
    return torch.randn(200, 70, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("triangle", [16, 64, 512])
def test_it_is_twice_the_sum_of_squares_whatever_the_blocks(inputs, triangle, monkeypatch):
    monkeypatch.setattr(module, "TRIANGLE", triangle)
    made = hessian_of([inputs[:50].reshape(5, 10, 70), inputs[50:]], 70)
    torch.testing.assert_close(made.matrix, 2 * inputs.T @ inputs, rtol=1e-5, atol=1e-4)
    assert made.tokens == 200


def test_tokens_can_follow_after_the_matrix_was_read(inputs):
    made = hessian_of([inputs[:50]], 70)
    assert made.matrix.shape == (70, 70)
    made.add(inputs[50:])
    torch.testing.assert_close(made.matrix, 2 * inputs.T @ inputs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("numbers", [1 << 24, 500, 1])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [([1, 1], [0, 0], [1, 1], 1), ([2, 1], [1, 2], [1, 2], 1), ([1, 1], [1, 1], [1, 1], 3)],
)
def test_patches_are_those_of_unfold_however_they_are_cut(stride, padding, dilation, groups, numbers, monkeypatch):
    monkeypatch.setattr(module, "PATCH_NUMBERS", numbers)
    images = torch.randn(3, 6, 9, 8, generator=torch.Generator().manual_seed(0))
    found = hessian_of_conv([images[:2], images[2]], (6, 6 // groups, 3, 2), stride, padding, dilation, groups)
    columns = functional.unfold(images, (3, 2), dilation, padding, stride)
    assert found.tokens == columns.shape[0] * columns.shape[2]
    for group, part in enumerate(columns.chunk(groups, 1)):
        rows = part.transpose(1, 2).flatten(0, 1)
        matrix = found.matrix if groups == 1 else found.matrix[group]
        torch.testing.assert_close(matrix, 2 * rows.T @ rows, rtol=1e-5, atol=1e-4)
