"""What edgeship needs of torchvision that it does not document: an upgrade that breaks it is red here and says what."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchvision", reason="torchvision is not installed")

from edgeship.compat import torchvision as compat


@pytest.mark.parametrize("count", [10, 2000])
def test_classes_are_kept_apart_by_a_function_of_ours(count: int) -> None:
    from torchvision.ops import batched_nms

    asked = []

    def function(boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, threshold: float) -> torch.Tensor:
        """Boxes [N, 4], scores and classes [N]; places [1]."""
        asked.append((tuple(boxes.shape), threshold, int(classes[0])))
        return torch.zeros(1, dtype=torch.int64)

    with compat.class_wise(function):
        batched_nms(torch.rand(count, 4), torch.rand(count), torch.full((count,), 7), 0.25)
    assert asked == [((count, 4), 0.25, 7)]


def test_few_boxes_are_suppressed_class_by_class_too() -> None:
    from torchvision.ops import batched_nms, nms

    # An offset of 2 ** 24 leaves nothing of corners below 1.
    boxes = torch.rand(40, 4) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    scores, classes = torch.rand(40), torch.full((40,), 1 << 24)
    with compat.one_by_one():
        found = batched_nms(boxes, scores, classes, 0.3)
    assert torch.equal(found, nms(boxes, scores, 0.3))
