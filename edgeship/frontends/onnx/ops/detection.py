"""Non-maximum suppression: how many boxes are kept depends on values, so the result has all rows that there can be."""

from __future__ import annotations

import torch

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.registry import op
from edgeship.program.suppression import best_first, first_true, keep_greedily, overlapping, taken

Tensor = torch.Tensor


@op("NonMaxSuppression")
def non_max_suppression(call: OpCall) -> Tensor:
    """Rows of (image, class, box), images and classes in their order, best boxes first; rows that count come first.

    ``boxes`` [N, B, 4], ``scores`` [N, C, B] -> [N * kept, 3].
    """
    boxes, scores = call.x(0), call.x(1)
    if boxes.dim() != 3 or scores.dim() != 3 or boxes.shape[:2] != (scores.shape[0], scores.shape[2]):
        raise call.broken(f"boxes of shape {list(boxes.shape)} for scores of shape {list(scores.shape)}")
    images, classes, count = scores.shape
    most = call.const_int(2, "max_output_boxes_per_class") if call.given(2) else 0
    threshold = _number(call, 3, "iou_threshold") if call.given(3) else 0.0
    least = _number(call, 4, "score_threshold") if call.given(4) else None
    most = max(0, min(most, count))
    if most == 0:
        return torch.zeros((0, 3), dtype=torch.int64)
    if not 0 <= threshold <= 1:
        raise call.broken(f"iou_threshold is {threshold:g}")
    rows = call.chosen
    counted = _counted(call, boxes, scores)
    limit = min(rows.candidates, classes * count)
    rows.given += [classes * count] * images
    with rows.at_rest():
        found = []
        for image in range(images):
            corners, own = _corners(call, torch.select(boxes, 0, image)), torch.select(scores, 0, image)
            found.append(_of_image(corners, own, counted, least, threshold, most, limit, image))
        picked = torch.cat([item[0] for item in found], 0)
        valid = torch.cat([item[1] for item in found], 0)
    return rows.noted(picked, valid, first=images == 1)


def _counted(call: OpCall, boxes: Tensor, scores: Tensor) -> Tensor | None:
    """Which boxes count, ``[B]``, where values chose them; None where all do."""
    found = [(call.chosen.rows(boxes), 1), (call.chosen.rows(scores), 2)]
    masks = [rows.mask for rows, axis in found if rows is not None and rows.axis == axis]
    if len(masks) != sum(1 for rows, _ in found if rows is not None):
        raise call.refuse("values chose its images or classes")
    return None if not masks else call.chosen.both(masks[0], masks[-1])


def _of_image(
    boxes: Tensor,
    scores: Tensor,
    chosen: Tensor | None,
    least: float | None,
    threshold: float,
    most: int,
    limit: int,
    image: int,
) -> tuple[Tensor, Tensor]:
    """What is kept of one image.

    Args:
        boxes: corners ``[B, 4]``. scores: ``[C, B]``. chosen: which boxes count, ``[B]``. most: boxes of one class.
        limit: pairs that are looked at.

    Returns:
        ``[limit, 3]`` int64, and whether each row counts.
    """
    classes, count = scores.shape
    flat = torch.reshape(scores, (classes * count,))
    enough = None if least is None else torch.gt(flat, least)
    if chosen is not None:
        wide = torch.reshape(torch.reshape(chosen, (1, -1)).expand(classes, count), (classes * count,))
        enough = wide if enough is None else torch.logical_and(enough, wide)
    # [C * B] -> [limit]
    order, _ = best_first(flat, limit, enough)
    counted = torch.ones((limit,)) if enough is None else taken(enough, order)
    own = torch.div(order, count, rounding_mode="floor")
    place = torch.sub(order, torch.mul(own, count))
    over = overlapping(torch.index_select(boxes, 0, place), threshold)
    if classes > 1:
        same = torch.eq(torch.reshape(own, (-1, 1)), torch.reshape(own, (1, -1)))
        over = torch.logical_and(over, same)
    kept = keep_greedily(over, counted)
    if most < min(count, limit):
        kept = torch.mul(kept, _among_first(kept, own, classes, most))
    if classes == 1:
        ranked, valid = first_true(kept)
    else:
        # By class, and in a class best first: no two keys are alike, and all are whole numbers that float32 holds.
        key = torch.add(torch.mul(own, limit), torch.arange(limit)).to(torch.float32)
        behind = float(classes * limit)
        values, ranked = torch.sort(
            torch.where(torch.gt(kept, 0.5), key, torch.add(torch.arange(limit).to(torch.float32), behind)),
            stable=True, dim=0,
        )  # fmt: skip
        valid = torch.lt(values, behind)
    own, place = torch.index_select(own, 0, ranked), torch.index_select(place, 0, ranked)
    picked = torch.stack([torch.full((limit,), image, dtype=torch.int64), own, place], 1)
    return torch.where(torch.reshape(valid, (-1, 1)), picked, torch.zeros((1, 1), dtype=torch.int64)), valid


def _among_first(kept: Tensor, own: Tensor, classes: int, most: int) -> Tensor:
    """1 for rows that are among the first ``most`` kept ones of their class, else 0. ``[K], [K] -> [K]``."""
    count = kept.shape[0]
    before = torch.triu(torch.ones(count, count), 1)
    if classes > 1:
        same = torch.eq(torch.reshape(own, (-1, 1)), torch.reshape(own, (1, -1)))
        before = torch.mul(same.to(torch.float32), before)
    rank = torch.reshape(torch.matmul(torch.reshape(kept, (1, -1)), before), (-1,))
    return torch.lt(rank, float(most)).to(torch.float32)


def _corners(call: OpCall, boxes: Tensor) -> Tensor:
    """Boxes as x1, y1, x2, y2 with the lower corner first. ``[B, 4] -> [B, 4]``."""
    columns = [torch.select(boxes, 1, index) for index in range(4)]
    if call.attr_int("center_point_box", 0):
        x, y, width, height = columns
        half_width, half_height = torch.div(width, 2.0), torch.div(height, 2.0)
        sides = [
            torch.sub(x, half_width), torch.sub(y, half_height), torch.add(x, half_width), torch.add(y, half_height)
        ]  # fmt: skip
        return torch.stack(sides, 1)
    top, left, bottom, right = columns
    low = [torch.minimum(left, right), torch.minimum(top, bottom)]
    high = [torch.maximum(left, right), torch.maximum(top, bottom)]
    return torch.stack([*low, *high], 1)


def _number(call: OpCall, index: int, role: str) -> float:
    values = call.const(index, role).reshape(-1)
    if values.numel() != 1:
        raise call.broken(f"{role} has {values.numel()} elements")
    return float(values[0].item())
