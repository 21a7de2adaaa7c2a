"""Non-maximum suppression as a program of fixed size, in operators that every runtime has.

The best `CANDIDATES` boxes by score are taken; of each pair it is computed whether the first suppresses the second, and
then, best first, a box is kept that no kept one suppresses. Boxes are not removed: what is kept stands first, and it is
said which rows count. Answers are those of ``torchvision.ops.nms``, ties and boxes without area included; shares of
boxes are rounded and compared as its float32 kernel does it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeship.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

# How many boxes of an image, best first, go into one suppression where nobody says otherwise.
CANDIDATES = 1000
# More make a matrix of pairs that no phone wants, and as many steps.
MOST_CANDIDATES = 4096
# Boxes that are decided together: all sets of them are guessed at once, two to the power of this.
BLOCK = 10
# Stands in for the score of a row that does not count. Float16 holds it.
LOWEST = -65504.0


@dataclass(frozen=True)
class Kept:
    """What a suppression keeps, best first.

    Args:
        index: places among the boxes that went in, int64 ``[..., K]``; behind the last kept one, others in range.
        valid: whether a row counts, bool ``[..., K]``: True first, then False.
    """

    index: Tensor
    valid: Tensor


def check_candidates(count: int) -> int:
    """``count`` where it is usable. Raises `UsageError`."""
    if not 1 <= count <= MOST_CANDIDATES:
        raise UsageError(f"{count} candidates are not 1 to {MOST_CANDIDATES}", fix=f"leave it out for {CANDIDATES}")
    return count


def looked_at(given: Iterable[int], candidates: int) -> list[str]:
    """What the report says of suppressions that were ``given`` more boxes than the ``candidates`` that they look at."""
    return [
        f"a suppression looks at the best {candidates} of {count} boxes; --set load/PASS.candidates=N changes that"
        for count in given
        if count > candidates
    ]


def suppress(
    boxes: Tensor,
    scores: Tensor,
    threshold: float,
    *,
    valid: Tensor | None = None,
    classes: Tensor | None = None,
    candidates: int = CANDIDATES,
) -> Kept:
    """Greedy suppression of one set of boxes.

    Args:
        boxes: corners ``[N, 4]`` as x1, y1, x2, y2. scores: ``[N]``, above -65504.
        threshold: what overlap (intersection over union) must exceed for the better box to suppress the other.
        valid: bool ``[N]``, the rows that count; all when None.
        classes: ``[N]``; boxes of different classes do not suppress each other.
        candidates: how many boxes are looked at, best first; those behind are not kept.

    Returns:
        ``min(N, candidates)`` rows.
    """
    import torch

    count = min(scores.shape[0], candidates)
    # [N] -> [K], best first, of equal scores the lower index first
    order, _ = best_first(scores, count, valid)
    over = overlapping(torch.index_select(boxes, 0, order), threshold)
    if classes is not None:
        own = torch.index_select(classes, 0, order)
        over = torch.logical_and(over, torch.eq(torch.reshape(own, (-1, 1)), torch.reshape(own, (1, -1))))
    counted = torch.ones((count,)) if valid is None else taken(valid, order)
    kept = keep_greedily(over, counted)
    place, found = first_true(kept)
    return Kept(torch.index_select(order, 0, place), found)


def taken(mask: Tensor, places: Tensor) -> Tensor:
    """A mask at some places, 0 or 1 in float32: Core ML chooses among no booleans. ``[N], [K] -> [K]``."""
    import torch

    return torch.index_select(mask.to(torch.float32), 0, places)


def best_first(scores: Tensor, count: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Places of the ``count`` largest scores, largest first, equal ones in their order; and the scores. Rows that do
    not count come last. ``[N] -> [count]`` twice."""
    import torch

    ranked = scores if valid is None else torch.where(valid, scores, torch.full((1,), LOWEST))
    values, places = torch.sort(ranked, stable=True, dim=0, descending=True)
    if count == scores.shape[0]:
        return places, values
    return torch.narrow(places, 0, 0, count), torch.narrow(values, 0, 0, count)


def overlapping(boxes: Tensor, threshold: float) -> Tensor:
    """Of each pair whether the first comes before the second and overlaps it too much. ``[K, 4] -> [K, K]`` bool."""
    import torch

    # [K, 4] -> four of [K]
    left, top, right, bottom = (torch.select(boxes, 1, side) for side in range(4))
    area = torch.mul(torch.sub(right, left), torch.sub(bottom, top))
    width = _shared(left, right)
    height = _shared(top, bottom)
    shared = torch.mul(width, height)
    union = torch.sub(torch.add(torch.reshape(area, (-1, 1)), torch.reshape(area, (1, -1))), shared)
    # Boxes without area have an empty union, and overlap nothing.
    union = torch.where(torch.gt(shared, 0.0), union, torch.ones((1, 1)))
    earlier = torch.triu(torch.ones(boxes.shape[0], boxes.shape[0]), 1) > 0
    return torch.logical_and(torch.gt(torch.div(shared, union), rounded_down(threshold)), earlier)


def _shared(low: Tensor, high: Tensor) -> Tensor:
    """How much of one axis each pair shares. ``[K], [K] -> [K, K]``."""
    import torch

    start = torch.maximum(torch.reshape(low, (-1, 1)), torch.reshape(low, (1, -1)))
    end = torch.minimum(torch.reshape(high, (-1, 1)), torch.reshape(high, (1, -1)))
    return torch.relu(torch.sub(end, start))


def rounded_down(threshold: float) -> float:
    """The largest float32 that is not above ``threshold``: kernels compare a float32 with the double itself."""
    import numpy as np

    near = np.float32(threshold)
    if float(near) > threshold:
        near = np.nextafter(near, np.float32(-math.inf))
    return float(near)


def keep_greedily(over: Tensor, counted: Tensor) -> Tensor:
    """Which rows are kept: those that count and that no kept earlier one is over.

    The equation has one solution, as ``over`` is strictly triangular. It is found block by block. Of each block every
    set of its rows is a guess; the right one is that with no fault, and the faults of all guesses are linear in which
    rows are left by the blocks before, so that a block is two products with matrices that are made for all at once.

    Args:
        over: bool ``[K, K]``; row, suppresses column. counted: 0 or 1, ``[K]``.

    Returns:
        0 or 1, float32 ``[K]``.
    """
    import torch
    from torch.nn import functional

    count = counted.shape[0]
    size = min(BLOCK, count)
    blocks = -(-count // size)
    missing = blocks * size - count
    hits, left = over.to(torch.float32), torch.reshape(counted, (1, count))
    if missing:
        hits, left = functional.pad(hits, [0, missing, 0, missing]), functional.pad(left, [0, missing])
    sets = _all_sets(size)
    slope, faultless = _faults(hits, sets, blocks)
    # By block: [size, sets], [1, sets] and [size, K].
    slopes, most, rivals = torch.split(slope, size, 0), torch.split(faultless, 1, 0), torch.split(hits, size, 0)
    parts: list[Tensor] = []
    for block in range(blocks):
        rows = torch.relu(torch.narrow(left, 1, block * size, size))
        # [1, size] x [size, sets]: 1 for the guess without a fault, 0 or less for the others.
        right = torch.sub(most[block], torch.matmul(rows, slopes[block]))
        # [1, sets] x [sets, size]
        kept = torch.matmul(torch.relu(right), sets)
        parts.append(kept)
        if block + 1 < blocks:
            left = torch.sub(left, torch.matmul(kept, rivals[block]))
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return torch.reshape(torch.narrow(whole, 1, 0, count) if missing else whole, (count,))


def _all_sets(size: int) -> Tensor:
    """Every set of ``size`` rows, 0 or 1 for each. ``[2 ** size, size]``."""
    import torch

    numbers = torch.arange(1 << size)
    bits = [torch.remainder(torch.div(numbers, 1 << row, rounding_mode="floor"), 2) for row in range(size)]
    return torch.stack(bits, 1).to(torch.float32)


def _faults(hits: Tensor, sets: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """How many faults each guess has: ``1 - faultless + left @ slope`` by the rows that are left of a block.

    A row of a guess is a fault if it is not left, or is hit by another one; a row that is left out is one if it is left
    and nothing hits it.

    Args:
        hits: 0 or 1, ``[K, K]``. sets: ``[sets, size]``.

    Returns:
        ``[K, sets]``, rows by block, and ``[blocks, sets]``.
    """
    import torch

    size, count = sets.shape[1], sets.shape[0]
    # The blocks on the diagonal: [K, K] -> [K * blocks, size] -> [K, size] -> [blocks, column, row]
    places = torch.arange(blocks * size) * blocks + torch.div(torch.arange(blocks * size), size, rounding_mode="floor")
    own = torch.index_select(torch.reshape(hits, (blocks * size * blocks, size)), 0, places)
    own = torch.reshape(torch.transpose(torch.reshape(own, (blocks, size, size)), 1, 2), (blocks * size, size))
    chosen = torch.reshape(torch.transpose(sets, 0, 1), (1, size, count)).contiguous()
    # [K, size] x [size, sets]: by how many of a guess each row is hit; then 1 where by none.
    number = torch.matmul(own, torch.reshape(chosen, (size, count)))
    free = torch.reshape(torch.relu(torch.sub(torch.ones((1, 1)), number)), (blocks, size, count))
    slope = torch.sub(torch.mul(free, torch.sub(torch.ones((1, 1, 1)), chosen)), chosen)
    # [blocks, size, sets] -> [blocks, sets]
    agreeing = torch.sum(torch.mul(free, chosen), 1)
    number_chosen = torch.sum(chosen, 1)
    faultless = torch.add(agreeing, torch.sub(1.0, torch.mul(number_chosen, 2.0)))
    return torch.reshape(slope, (blocks * size, count)), faultless


def first_true(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the rows that are kept, in their order, the others behind them; and which of these are kept.

    ``[K]`` of 0 and 1 ``-> [K]`` int64 and bool.
    """
    import torch

    count = kept.shape[0]
    # No two alike, so that every engine orders them alike.
    falling = torch.arange(count, 0, -1).to(torch.float32)
    values, places = torch.sort(torch.add(torch.mul(kept, float(count)), falling), stable=True, dim=0, descending=True)
    return places, torch.gt(values, float(count) + 0.5)
