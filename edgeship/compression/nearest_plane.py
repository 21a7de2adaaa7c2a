"""Rounding one input channel after the other so that the outputs move least: Babai's nearest plane.

With the Cholesky factor ``H = U^T U`` of a Hessian the squared error of the outputs is ``||U E||^2``, one term a row of
``U``. Taking channels from the last to the first, each is rounded so that its own term is smallest given the errors
before. These are GPTQ's numbers without an inverse (Chen et al. 2025, arXiv:2507.18553). A term is what no channel
later on can make up for, so ranges can be compared by the terms that they leave.

Layout: ``(groups, K, rows)``, channels before rows, so that each step reads and writes memory that lies together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edgeship.compression.affine import storage_grid
from edgeship.compression.hessian import Factored

if TYPE_CHECKING:
    import torch

    from edgeship.compression.hessian import Hessian
    from edgeship.core.weights import Affine

    # (weights wanted, (groups, rows), which may be overwritten; place in the order; integers, which are written)
    # -> what the integers stand for
    Round = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]

# Channels whose errors are propagated together, and those of them that stay in the processor's nearest cache.
BLOCK, STEP = 128, 8
# Ranges for each block of weights: the whole one down to half of it. Of a group those are tried in earnest that lose
# least by plain rounding: 24 ranked and 6 tried leave less than 16 tried, in less time. Of whole rows all are tried.
RANGES, TRIED, ROW_RANGES = 24, 6, 16
LEAST_RANGE = 0.5
# Trials of groups keep so many numbers at once that a processor's cache holds them (8 MB).
CACHED_NUMBERS = 1 << 21
# Ranges that are ranked are taken together up to so many numbers (512 KB).
RANKED_NUMBERS = 1 << 17
# Trials of whole rows keep at most this many numbers at once (128 MB).
TRIAL_NUMBERS = 1 << 25


def factor(hessian: Hessian, order: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the Hessian in the given order, ``(groups, K, K)``, damped as little as it takes."""
    import torch

    known = hessian.factored
    if known is not None and known.damping == damping and torch.equal(known.order, order):
        return known.upper
    asked = damping
    hessian.mirror()
    # [groups, K, K], rows and columns in the order of rounding
    matrix = hessian.upper[:, order[:, None], order]
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    # A channel that nothing reaches is on its own; its number only has to be positive.
    diagonal[diagonal == 0] = 1.0
    added = 0.0
    while True:
        diagonal += mean.clamp(min=1e-30) * (damping - added)
        added = damping
        upper: torch.Tensor
        upper, failed = torch.linalg.cholesky_ex(matrix, upper=True)
        if not bool(failed.any()) and bool(torch.isfinite(upper).all()):
            hessian.factored = Factored(order, asked, upper)
            return upper
        damping = max(damping * 10, 1e-6)


def descend(
    target: torch.Tensor,
    upper: torch.Tensor,
    rounding: Round,
    keep: torch.Tensor | None = None,
    pushed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round channels from the last to the first.

    Args:
        target: ``(groups, K, rows)``. upper: ``(groups, K, K)``. keep: bool like ``target``; False becomes zero.
        pushed: like ``target``, what errors in channels behind these add to each term.

    Returns:
        Integers (float32) and errors, like ``target``; the sum of the terms, ``(groups, rows)``.
    """
    import torch

    columns = target.shape[1]
    errors, integers = torch.empty_like(target), torch.empty_like(target)
    loss = torch.zeros_like(target[:, 0])
    pivots = upper.diagonal(dim1=1, dim2=2)[:, :, None]
    unit = upper / pivots
    for end in range(columns, 0, -BLOCK):
        start = max(0, end - BLOCK)
        # [groups, block, K - end] x [groups, K - end, rows] -> [groups, block, rows]
        far = torch.bmm(upper[:, start:end, end:], errors[:, end:])
        if pushed is not None:
            far += pushed[:, start:end]
        wanted = target[:, start:end] + far / pivots[:, start:end]
        for last in range(end, start, -STEP):
            first = max(start, last - STEP)
            near = wanted[:, first - start : last - start]
            if last < end:
                near.baddbmm_(unit[:, first:last, last:end], errors[:, last:end])
            for i in range(last - 1, first - 1, -1):
                line = near[:, i - first : i - first + 1]
                if i + 1 < last:
                    line.baddbmm_(unit[:, i : i + 1, i + 1 : last], errors[:, i + 1 : last])
                values = rounding(line[:, 0], i, integers[:, i])
                if keep is not None:
                    values = values * keep[:, i]
                torch.sub(target[:, i], values, out=errors[:, i])
        loss += far.baddbmm_(upper[:, start:end, start:end], errors[:, start:end]).square_().sum(1)
    return integers, errors, loss


def descend_in_groups(
    target: torch.Tensor, upper: torch.Tensor, encoding: Affine, blocks: list[int], keep: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round groups of channels from the last to the first, each with the range that leaves the least behind.

    A group's ranges are shares of what its weights span once they have made up for the errors before it.

    Args:
        target: ``(1, K, rows)``, groups of ``encoding.group_size`` channels together.
        blocks: for each group in that order, its place among the weight's groups.

    Returns:
        Integers like ``target``; scales and zero points, ``(rows, groups)``.
    """
    import torch

    width, rows = encoding.group_size or 1, target.shape[2]
    integers, errors = torch.empty_like(target), torch.empty_like(target)
    scales, zeros = torch.empty(rows, len(blocks)), torch.empty(rows, len(blocks))
    step = max(1, CACHED_NUMBERS // (width * TRIED))
    for place in range(len(blocks) - 1, -1, -1):
        start, end = place * width, (place + 1) * width
        # [1, width, width]
        inner = upper[:, start:end, start:end]
        far = torch.bmm(upper[:, start:end, end:], errors[:, end:])
        for first in range(0, rows, step):
            some = slice(first, min(first + step, rows))
            part, pushed = target[:, start:end, some], far[:, :, some]
            kept = None if keep is None else keep[:, start:end, some]
            moved = part + torch.linalg.solve_triangular(inner, pushed, upper=True)
            ranges = _ranges(*_span(moved if kept is None else moved * kept), encoding, RANGES)
            scale, zero = _promising(moved, inner, *ranges, encoding, kept)
            # Every range at once, side by side: [1, width, TRIED * rows].
            many = [value if value is None else value.repeat(1, 1, TRIED) for value in (kept, pushed)]
            found, lost, loss = descend(part.repeat(1, 1, TRIED), inner, _affine(scale, zero, encoding), *many)
            count = part.shape[2]
            # [TRIED, rows] -> the place of each row's best among all: [rows]
            chosen = loss.reshape(TRIED, count).argmin(0) * count + torch.arange(count)
            integers[:, start:end, some], errors[:, start:end, some] = found[:, :, chosen], lost[:, :, chosen]
            scales[some, blocks[place]], zeros[some, blocks[place]] = scale[0, chosen], zero[0, chosen]
    return integers, scales, zeros


def _promising(
    moved: torch.Tensor,
    inner: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    encoding: Affine,
    keep: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the ranges of a group the `TRIED` that lose least when its weights are rounded to nearest.

    Args:
        moved: ``(1, width, rows)``, the weights once they have made up for the errors before them.
        scale, zero: ``(1, RANGES * rows)``.

    Returns:
        Scales and zero points, ``(1, TRIED * rows)``.
    """
    import torch

    rows = moved.shape[2]
    # [1, RANGES * rows] -> [RANGES, 1, rows]
    scales, zeros = scale.reshape(RANGES, 1, rows), zero.reshape(RANGES, 1, rows)
    losses = torch.empty(RANGES, rows)
    step = max(1, RANKED_NUMBERS // moved.numel())
    for first in range(0, RANGES, step):
        some = slice(first, first + step)
        # (ranges, width, rows)
        values = moved.repeat(scales[some].shape[0], 1, 1)
        integers = torch.empty_like(values)
        values = round_on(values, scales[some], zeros[some], encoding, integers)
        values = values if keep is None else values.mul_(keep)
        torch.matmul(inner, values.sub_(moved), out=integers)
        torch.sum(integers.square_(), 1, out=losses[some])
    # [RANGES, rows] -> [TRIED, rows]
    best = losses.topk(TRIED, dim=0, largest=False).indices
    return scales[:, 0].gather(0, best).reshape(1, -1), zeros[:, 0].gather(0, best).reshape(1, -1)


def descend_in_rows(
    target: torch.Tensor, upper: torch.Tensor, encoding: Affine, keep: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round whole rows, each with the range that moves its outputs least, some rows at a time.

    Returns:
        Integers like ``target``, ``(groups, K, rows)``; scales and zero points, ``(groups * rows, 1)``.
    """
    import torch

    groups, columns, rows = target.shape
    integers = torch.empty_like(target)
    scales, zeros = torch.empty(groups, rows), torch.empty(groups, rows)
    step = max(1, TRIAL_NUMBERS // (groups * columns * ROW_RANGES))
    for start in range(0, rows, step):
        # [groups, K, some rows]
        part = target[:, :, start : start + step]
        count = part.shape[2]
        kept = None if keep is None else keep[:, :, start : start + step].repeat(1, 1, ROW_RANGES)
        scale, zero = _ranges(*_span(part), encoding, ROW_RANGES)
        # Every range at once, side by side: [groups, K, ROW_RANGES * rows].
        found, _, loss = descend(part.repeat(1, 1, ROW_RANGES), upper, _affine(scale, zero, encoding), kept)
        # [groups, ROW_RANGES, rows] -> the place of each row's best among all: [groups, rows]
        chosen = loss.reshape(groups, ROW_RANGES, count).argmin(1) * count + torch.arange(count)
        integers[:, :, start : start + step] = found.gather(2, chosen[:, None].expand(-1, columns, -1))
        scales[:, start : start + step] = scale.gather(1, chosen)
        zeros[:, start : start + step] = zero.gather(1, chosen)
    return integers, scales.reshape(-1, 1), zeros.reshape(-1, 1)


def _span(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest weight of each row, ``(groups, rows)``, zero between them."""
    return value.amin(1).clamp(max=0), value.amax(1).clamp(min=0)


def _ranges(low: torch.Tensor, high: torch.Tensor, encoding: Affine, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points of the ranges tried, ``(groups, count * rows)``, on the grid that artifacts store."""
    import torch

    # (ranges, groups, rows)
    share = torch.tensor([1 - step * (1 - LEAST_RANGE) / count for step in range(count)])[:, None, None]
    if encoding.symmetric:
        scale = storage_grid(torch.maximum(-low, high) * (share / encoding.high), encoding)
        zero = torch.zeros_like(scale)
    else:
        scale = storage_grid((high - low) * (share / encoding.high), encoding)
        zero = (-low * share / scale).round().clamp(encoding.low, encoding.high)
    # [ranges, groups, rows] -> [groups, ranges * rows]
    return scale.transpose(0, 1).flatten(1), zero.transpose(0, 1).flatten(1)


def _affine(scale: torch.Tensor, zero: torch.Tensor, encoding: Affine) -> Round:
    """One scale and zero point a row for all channels."""

    def rounding(wanted: torch.Tensor, place: int, integers: torch.Tensor) -> torch.Tensor:
        """``wanted``: one input channel of every row, [groups, rows]."""
        return round_on(wanted, scale, zero, encoding, integers)

    return rounding


def round_on(
    wanted: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, encoding: Affine, integers: torch.Tensor
) -> torch.Tensor:
    """Round to nearest on a grid, without new memory.

    All of one shape, or shapes that broadcast to that of ``wanted``.

    Args:
        wanted: becomes what the integers stand for. integers: what they are written to. scale, zero: spread over both.
    """
    import torch

    torch.div(wanted, scale, out=wanted).round_()
    if encoding.symmetric:
        torch.clamp(wanted, encoding.low, encoding.high, out=integers)
        return torch.mul(integers, scale, out=wanted)
    torch.clamp(wanted.add_(zero), encoding.low, encoding.high, out=integers)
    return torch.sub(integers, zero, out=wanted).mul_(scale)
