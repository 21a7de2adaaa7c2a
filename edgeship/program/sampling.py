"""Values of an image or a volume at points that a network computes (``grid_sample``), as choices and sums.

Converters know it for images, and reflection at the edges in some; the written form is the same for all.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

NEAREST = 1
BORDER, REFLECTION = 1, 2


def sampled_plainly(node: Node) -> bool:
    """Whether a ``grid_sampler`` is one that converters lack: of a volume, or reflected at the edges."""
    rank = len(node.args[0].meta["val"].shape)  # type: ignore[union-attr]
    return bool(rank == 5 or node.args[3] == REFLECTION)


def grid_sampler(x: torch.Tensor, grid: torch.Tensor, mode: int, padding: int, corners: bool) -> torch.Tensor:
    """[N, C, *sizes] at ``grid`` [N, *out, axes], from -1 to 1, the last axis first -> [N, C, *out].

    Args:
        mode: 0 linear, 1 nearest. padding: beyond the edges 0 zeros, 1 the edge, 2 the reflection.
        corners: whether -1 and 1 are the centres of the outermost elements, or their outer edges.
    """
    import torch

    sizes = x.shape[2:]
    points = grid.flatten(1, -2)
    places = [_place(points[..., -1 - axis], size, padding, corners) for axis, size in enumerate(sizes)]
    flat = x.flatten(2)
    if mode == NEAREST:
        found = _chosen(flat, [torch.round(place) for place in places], sizes)
        return found.reshape(*found.shape[:2], *grid.shape[1:-1])
    found = torch.zeros_like(points[..., 0]).unsqueeze(1)
    below = [torch.floor(place) for place in places]
    for corner in itertools.product((0, 1), repeat=len(sizes)):
        weight = torch.ones_like(places[0])
        for place, floor, step in zip(places, below, corner, strict=True):
            share = place - floor
            weight = weight * (share if step else 1 - share)
        # [N, C, points] * [N, 1, points]
        taken = _chosen(flat, [floor + step for floor, step in zip(below, corner, strict=True)], sizes)
        found = found + taken * weight.unsqueeze(1)
    return found.reshape(*found.shape[:2], *grid.shape[1:-1])


def affine_grid(theta: torch.Tensor, size: list[int], corners: bool) -> torch.Tensor:
    """Points of an image or a volume moved by ``theta`` [N, axes, axes + 1]: [N, *sizes, axes], the last axis first.

    ``size`` is [N, C, *sizes].
    """
    import torch

    axes = [torch.linspace(-1, 1, length) if corners else _middles(length) for length in size[2:]]
    # One -1 .. 1 each of [sizes], in the order of the coordinates, and 1 for the shift: [points, axes + 1]
    points = torch.meshgrid(*axes, indexing="ij")[::-1]
    whole = torch.stack([*points, torch.ones_like(points[0])], -1).reshape(-1, len(axes) + 1)
    moved = whole @ theta.mT
    return moved.reshape(theta.shape[0], *size[2:], len(axes))


def _middles(length: int) -> torch.Tensor:
    """Centres of ``length`` equal parts of -1 to 1: [length]."""
    import torch

    return (torch.arange(length) * 2 + 1) / length - 1


def _place(point: torch.Tensor, size: int, padding: int, corners: bool) -> torch.Tensor:
    """Where a point of -1 to 1 lies along an axis, in elements; any shape."""
    import torch

    place = (point + 1) * (0.5 * (size - 1)) if corners else (point + 1) * (0.5 * size) - 0.5
    if padding == REFLECTION:
        low, span = (0.0, float(size - 1)) if corners else (-0.5, float(size))
        place = _reflected(place, low, span) if span else torch.zeros_like(place)
    return place if padding not in (BORDER, REFLECTION) else torch.clamp(place, 0.0, size - 1.0)


def _reflected(place: torch.Tensor, low: float, span: float) -> torch.Tensor:
    """Thrown back at ``low`` and at ``low + span`` as often as it takes; any shape."""
    import torch

    away = torch.abs(place - low)
    turn = away - torch.floor(away / (2 * span)) * (2 * span)
    return torch.minimum(turn, 2 * span - turn) + low


def _chosen(flat: torch.Tensor, places: list[torch.Tensor], sizes: torch.Size) -> torch.Tensor:
    """Elements [N, C, elements] at whole places [N, points] along each axis, zero beyond -> [N, C, points]."""
    import torch

    kept = [torch.clamp(place, 0.0, size - 1.0) for place, size in zip(places, sizes, strict=True)]
    # Whole numbers: half precision counts to 2048 only.
    index = kept[-1].to(torch.int64)
    inside = (kept[-1] == places[-1]).to(flat.dtype)
    for axis, place in enumerate(kept[:-1]):
        inside = inside * (place == places[axis]).to(flat.dtype)
        index = index + place.to(torch.int64) * math.prod(sizes[axis + 1 :])
    chosen = flat.gather(2, index.unsqueeze(1).expand(-1, flat.shape[1], -1))
    return chosen * inside.unsqueeze(1)
