import pytest
import torch
from torch.fx import Graph

from edgeship.compression.held import Batches, Shelf

VALUES = [
    torch.arange(12.0).reshape(3, 4),
    torch.arange(7),
    torch.tensor([True, False]),
    torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    torch.arange(20.0).reshape(4, 5).T,
    torch.tensor(2.5),
    torch.zeros(0, 3),
    (1, torch.ones(2)),
]


@pytest.fixture
def node():
    return Graph().placeholder("x")


@pytest.mark.parametrize("limit", [0, 60, 1 << 20])
def test_values_come_back_as_they_were_from_memory_and_from_a_file(node, tmp_path, limit):
    shelf = Shelf(len(VALUES), limit, tmp_path)
    for index, value in enumerate(VALUES):
        shelf.put(node, index, value)
    assert shelf.held_bytes <= limit
    for index in reversed(range(len(VALUES))):
        found, value = shelf.get(node, index), VALUES[index]
        if isinstance(value, tuple):
            assert found is value
        else:
            assert found.dtype == value.dtype
            assert torch.equal(found, value)
    # A file without a name is gone whatever happens to the process.
    assert list(tmp_path.iterdir()) == []
    shelf.drop(node)
    assert node not in shelf
    assert shelf.held_bytes == 0


def test_a_part_of_a_tensor_does_not_keep_the_whole(node):
    shelf = Shelf(1)
    shelf.put(node, 0, torch.arange(1000.0)[:10])
    assert shelf.get(node, 0).untyped_storage().nbytes() == 40


def test_batches_are_a_sequence():
    batches = Batches(4, torch.tensor)
    assert [int(item) for item in batches] == [0, 1, 2, 3]
    assert int(batches[-1]) == 3
    assert [int(item) for item in batches[1:3]] == [1, 2]
    with pytest.raises(IndexError):
        batches[4]
