"""Non-maximum suppression of boxes given as (centre x, centre y, width, height)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs


@op("non_maximum_suppression")
def non_maximum_suppression(call: Call) -> Outputs:
    """Boxes, scores and indices of the survivors, best first; places left over hold zeros and the index -1.

    Until iOS 16 boxes come as (n, B, 4) with a score threshold, and a fourth output counts the survivors; since
    iOS 17 they come as (n, 4, B).
    """
    boxes, scores = call.floats("boxes"), call.floats("scores")
    boxes_last = not call.has("score_threshold") and len(call.outputs) == 3
    if boxes_last:
        boxes, scores = boxes.transpose(1, 2), scores.transpose(1, 2)
    count = call.integer("max_boxes")
    kept_boxes = torch.zeros(boxes.shape[0], count, 4)
    kept_scores = torch.zeros(boxes.shape[0], count, scores.shape[2])
    indices = torch.full((boxes.shape[0], count), -1)
    survivors = []
    for image in range(boxes.shape[0]):
        kept = _survivors(call, boxes[image], scores[image])[:count]
        kept_boxes[image, : len(kept)] = boxes[image, kept]
        kept_scores[image, : len(kept)] = scores[image, kept]
        indices[image, : len(kept)] = torch.tensor(kept)
        survivors.append(len(kept))
    if boxes_last:
        return kept_boxes.transpose(1, 2), kept_scores.transpose(1, 2), indices
    return kept_boxes, kept_scores, indices, torch.tensor(survivors)


def _survivors(call: Call, boxes: Tensor, scores: Tensor) -> list[int]:
    """The boxes [n, 4] that are kept, best first, by their ``scores`` [n, classes]."""
    best, classes = scores.max(dim=1)
    threshold = call.number("score_threshold") if call.has("score_threshold") else None
    limit, per_class = call.number("iou_threshold"), call.flag("per_class_suppression")
    overlap = _overlap(boxes)
    kept: list[int] = []
    order = torch.argsort(best, descending=True, stable=True).tolist()
    for box in order:
        if threshold is not None and best[box] <= threshold:
            break
        rivals = [k for k in kept if not per_class or classes[k] == classes[box]]
        if not any(overlap[box, k] > limit for k in rivals):
            kept.append(box)
    # Core ML answers with the best box where none passes the threshold.
    return kept or order[:1]


def _overlap(boxes: Tensor) -> Tensor:
    """Intersection over union of each pair; 0 where both are empty. ``boxes`` [n, 4] as centre and size -> [n, n]."""
    centre, size = boxes[:, :2], boxes[:, 2:]
    low, high = centre - size / 2, centre + size / 2
    sides = (torch.minimum(high[:, None], high[None]) - torch.maximum(low[:, None], low[None])).clamp(min=0)
    shared = sides.prod(dim=-1)
    area = size.prod(dim=-1)
    union = area[:, None] + area[None] - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(union))
