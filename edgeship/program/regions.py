"""Samples of regions of feature maps (RoIAlign, https://arxiv.org/abs/1703.06870) in ordinary operators."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from edgeship.errors import SourceError

if TYPE_CHECKING:
    from torch import Tensor


def align_regions(
    x: Tensor,
    rois: Tensor,
    batch: Tensor,
    size: tuple[int, int],
    *,
    ratio: int,
    scale: float,
    half_pixel: bool,
    largest: bool = False,
) -> Tensor:
    """Mean (or largest) of a fixed grid of bilinear samples in each bin of each region.

    Args:
        x: ``[N, C, H, W]``. rois: corners ``[R, 4]``. batch: of which image each region is, int64 ``[R]``.
        size: bins, rows and columns. ratio: samples along each side of a bin, 1 or more.
        scale: from the regions' coordinates to the map's. half_pixel: whether a pixel's middle is at a half.

    Returns:
        ``[R, C, rows, columns]``.
    """
    import torch

    count, channels = rois.shape[0], x.shape[1]
    offset = 0.5 if half_pixel else 0.0
    # [R, 4]
    corners = torch.sub(torch.mul(rois, scale), offset)
    left, top, right, bottom = (torch.select(corners, 1, index) for index in range(4))
    spans = [torch.sub(bottom, top), torch.sub(right, left)]
    if not half_pixel:
        spans = [torch.clamp(span, min=1.0) for span in spans]
    rows, columns = size[0] * ratio, size[1] * ratio
    y = torch.broadcast_to(torch.reshape(_places(top, spans[0], rows), (-1, rows, 1)), (count, rows, columns))
    z = torch.broadcast_to(torch.reshape(_places(left, spans[1], columns), (-1, 1, columns)), (count, rows, columns))
    height, width = x.shape[2], x.shape[3]
    # [N, C, H, W] -> [N * H * W, C]: a sample is a row, so that no map is repeated for each region.
    flat = torch.reshape(torch.permute(x, (0, 2, 3, 1)), (-1, channels))
    start = torch.reshape(torch.mul(batch, height * width), (-1, 1, 1))
    samples = []
    for index, weight in _corners(y, z, height, width):
        places = torch.reshape(torch.add(index, start), (-1,))
        picked = torch.index_select(flat, 0, places)
        samples.append(torch.mul(picked, torch.reshape(weight, (-1, 1))))
    # Samples of one bin on axes of their own, over which is averaged.
    shape = (count, size[0], ratio, size[1], ratio, channels)
    if largest:
        # The reference takes the largest weighted corner, not the largest interpolated value.
        joined = torch.amax(torch.reshape(torch.stack(samples, 0), (4, *shape)), (0, 3, 5))
    else:
        total = torch.add(torch.add(samples[0], samples[1]), torch.add(samples[2], samples[3]))
        joined = torch.mean(torch.reshape(total, shape), (2, 4))
    # [R, rows, columns, C] -> [R, C, rows, columns]
    return torch.permute(joined, (0, 3, 1, 2))


def torchvision_roi_align(
    x: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """``torch.ops.torchvision.roi_align``. ``rois`` ``[R, 5]``, the image first.

    Raises:
        SourceError: the number of samples depends on the regions.
    """
    import torch

    if sampling_ratio < 1:
        raise SourceError(
            "roi_align with sampling_ratio below 1 takes as many samples as the regions are large",
            fix="give it sampling_ratio=2",
        )
    return align_regions(
        x,
        torch.narrow(rois, 1, 1, 4),
        torch.select(rois, 1, 0).to(torch.int64),
        (pooled_height, pooled_width),
        ratio=sampling_ratio,
        scale=spatial_scale,
        half_pixel=aligned,
    )


def _places(start: Tensor, span: Tensor, count: int) -> Tensor:
    """Sample places along one axis of each region. ``[R], [R] -> [R, count]``."""
    import torch

    steps = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.add(torch.unsqueeze(start, 1), torch.mul(torch.unsqueeze(span, 1), steps.to(start.dtype)))


def _corners(y: Tensor, x: Tensor, height: int, width: int) -> list[tuple[Tensor, Tensor]]:
    """The four neighbours of each place as flat index and weight; far outside has weight 0.

    ``y`` and ``x`` have one shape, and so has each index and weight.
    """
    import torch

    inside = (y >= -1.0) & (y <= height) & (x >= -1.0) & (x <= width)
    y, x = torch.clamp(y, 0.0, height - 1.0), torch.clamp(x, 0.0, width - 1.0)
    y_low, x_low = torch.floor(y), torch.floor(x)
    y_part, x_part = torch.sub(y, y_low), torch.sub(x, x_low)
    result = []
    for dy, dx in itertools.product((0, 1), (0, 1)):
        row = torch.clamp(torch.add(y_low, dy), max=height - 1.0).to(torch.int64)
        column = torch.clamp(torch.add(x_low, dx), max=width - 1.0).to(torch.int64)
        weight = torch.mul(y_part if dy else torch.rsub(y_part, 1.0), x_part if dx else torch.rsub(x_part, 1.0))
        result.append((torch.add(torch.mul(row, width), column), torch.where(inside, weight, torch.zeros_like(weight))))
    return result
