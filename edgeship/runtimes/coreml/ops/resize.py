"""Resizing images by sampling a grid: bilinear or nearest, one axis after the other.

A ``sampling_mode`` says where the samples lie between the first and last element of an axis (``grid_points``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgeship.errors import UnsupportedOpError
from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs


def grid_points(mode: str, start: float, end: float, count: int) -> npt.NDArray[np.float64]:
    """``count`` positions between the elements ``start`` and ``end`` (inclusive) of an axis, not yet clamped."""
    i = np.arange(count, dtype=np.float64)
    size = end - start + 1
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if count == 1:
            return np.array([start if mode == "STRICT_ALIGN_CORNERS" else (start + end) / 2])
        return start + i * (end - start) / (count - 1)
    if mode == "DEFAULT":
        return start + (i * (size - size / count) / (count - 1) if count > 1 else i)
    if mode == "OFFSET_CORNERS":
        delta = max(1.0, end - start) / count
        return start + 0.5 * delta + i * delta
    if mode == "UNALIGN_CORNERS":
        return start + (i + 0.5) * size / count - 0.5
    raise UnsupportedOpError(f"sampling_mode {mode}", fix="known: [STRICT_]ALIGN_, OFFSET_, UNALIGN_CORNERS, DEFAULT")


def interpolate(x: Tensor, axis: int, grid: npt.NDArray[np.float64]) -> Tensor:
    """``x`` sampled at the positions ``grid`` of an axis, linearly; positions outside are clamped."""
    size = x.shape[axis]
    clamped = np.clip(grid, 0, size - 1)
    below = np.minimum(np.floor(clamped).astype(np.int64), size - 1)
    shape = [-1 if i == axis % x.dim() else 1 for i in range(x.dim())]
    fraction = torch.from_numpy((clamped - below).astype(np.float32)).reshape(shape)
    left = x.index_select(axis, torch.from_numpy(below))
    right = x.index_select(axis, torch.from_numpy(np.minimum(below + 1, size - 1)))
    return left * (1 - fraction) + right * fraction


def nearest(x: Tensor, axis: int, positions: npt.NDArray[np.float64]) -> Tensor:
    """``x`` at the elements ``floor(positions)`` of an axis, clamped."""
    index = np.clip(np.floor(positions), 0, x.shape[axis] - 1).astype(np.int64)
    return x.index_select(axis, torch.from_numpy(index))


def _scaled_size(call: Call, axis: int, size: int, name: str) -> int:
    # The declared size is what the compiler settled on; a float32 factor such as 7/3 may round below it.
    declared = call.outputs[0].type.shape[axis]
    return declared if declared is not None else math.floor(size * call.number(name, 1.0) + 1e-6)


@op("upsample_bilinear")
def upsample_bilinear(call: Call) -> Outputs:
    """By factors; the samples follow from the sizes, as PyTorch's ``recompute_scale_factor``."""
    x = call.floats("x")
    align = call.flag("align_corners", True)
    half_pixel = call.flag("half_pixel_centers", not align)
    for axis, name in ((-2, "scale_factor_height"), (-1, "scale_factor_width")):
        size = x.shape[axis]
        count = _scaled_size(call, axis, size, name)
        if align:
            grid = grid_points("STRICT_ALIGN_CORNERS", 0, size - 1, count)
        elif half_pixel:
            grid = grid_points("UNALIGN_CORNERS", 0, size - 1, count)
        else:
            grid = np.arange(count, dtype=np.float64) * size / count
        x = interpolate(x, axis, grid)
    return x


@op("upsample_nearest_neighbor")
def upsample_nearest_neighbor(call: Call) -> Outputs:
    """By factors: element ``floor(i / factor)``."""
    x = call.data("x")
    for axis, name in ((-2, "scale_factor_height"), (-1, "scale_factor_width")):
        count = _scaled_size(call, axis, x.shape[axis], name)
        x = nearest(x, axis, np.arange(count) * x.shape[axis] / count + 1e-9)
    return x


@op("resize_bilinear")
def resize_bilinear(call: Call) -> Outputs:
    """To a size, with a sampling mode."""
    return _resize(
        call, call.floats("x"), [call.integer("target_size_height", 1), call.integer("target_size_width", 1)]
    )


@op("resize_nearest_neighbor")
def resize_nearest_neighbor(call: Call) -> Outputs:
    """To a size: element ``floor(i in / out)``."""
    x = call.data("x")
    for axis, name in ((-2, "target_size_height"), (-1, "target_size_width")):
        count = call.integer(name)
        x = nearest(x, axis, np.arange(count) * x.shape[axis] / count + 1e-9)
    return x


@op("resize")
def resize(call: Call) -> Outputs:
    """The last ``resized_dims`` axes to the last sizes of ``shape``; 0 keeps a size (iOS 17)."""
    dims = call.integer("resized_dims")
    x = call.numbers("x")
    wanted = call.integers("shape")[-dims:] if dims else []
    sizes = [size or x.shape[i - dims] for i, size in enumerate(wanted)]
    if call.text("interpolation_mode", "LINEAR") == "LINEAR":
        return _resize(call, x.to(torch.float32), sizes)
    for axis, count in zip(range(-dims, 0), sizes, strict=True):
        grid = grid_points(call.text("sampling_mode", "DEFAULT"), 0, x.shape[axis] - 1, count)
        x = nearest(x, axis, grid + 0.5)
    return x


def _resize(call: Call, x: Tensor, sizes: list[int]) -> Tensor:
    """The last axes of ``x`` to ``sizes``, one after the other."""
    for axis, count in zip(range(-len(sizes), 0), sizes, strict=True):
        if count != x.shape[axis]:
            x = interpolate(x, axis, grid_points(call.text("sampling_mode", "DEFAULT"), 0, x.shape[axis] - 1, count))
    return x


@op("crop_resize")
def crop_resize(call: Call) -> Outputs:
    """Boxes cut out of images and resized: (N, B, C, h, w), or (N, C, h, w) since iOS 17."""
    x = call.floats("x")
    height, width = call.integer("target_height", 1), call.integer("target_width", 1)
    if call.has("boxes"):
        # [boxes, 4], of one image each
        boxes = call.floats("boxes")
        picks = call.optional_integers("box_indices") or list(range(boxes.shape[0]))
        crops = [_crop(call, x[pick], box, height, width) for box, pick in zip(boxes, picks, strict=True)]
        return torch.stack(crops)
    # [boxes, 4] of every image, or [boxes, 5] with the image's number in front
    rows = call.floats("roi").flatten(1)
    # [boxes, images, C, height, width]: of one image where a fifth number says which, of all without it.
    crops = []
    for row in rows:
        if rows.shape[1] == 5:
            crops.append(_crop(call, x[int(row[0])], row[1:], height, width).unsqueeze(0))
        else:
            crops.append(torch.stack([_crop(call, image, row, height, width) for image in x]))
    return torch.stack(crops)


def _crop(call: Call, image: Tensor, box: Tensor, height: int, width: int) -> Tensor:
    """One box of one image (C, H, W); samples outside the image are ``pad_value``.

    ``box`` [4] -> [C, height, width].
    """
    mode = call.text("box_coordinate_mode", "CORNERS_HEIGHT_FIRST")
    first, second, third, fourth = (float(value) for value in box)
    if mode.endswith("WIDTH_FIRST"):
        first, second, third, fourth = second, first, fourth, third
    if mode.startswith("CENTER_SIZE"):
        first, second, third, fourth = first - third / 2, second - fourth / 2, first + third / 2, second + fourth / 2
    scale = call.number("spatial_scale", 1.0)
    inside = []
    for axis, start, end, count in ((-2, first, third, height), (-1, second, fourth, width)):
        unit = scale * (image.shape[axis] - 1 if call.flag("normalized_coordinates") else 1)
        grid = grid_points(call.text("sampling_mode", "DEFAULT"), start * unit, end * unit, count)
        inside.append(torch.from_numpy((grid >= -1e-6) & (grid <= image.shape[axis] - 1 + 1e-6)))
        image = interpolate(image, axis, grid)
    keep = inside[0].unsqueeze(1) & inside[1].unsqueeze(0)
    return torch.where(keep, image, torch.tensor(call.number("pad_value", 0.0)))
