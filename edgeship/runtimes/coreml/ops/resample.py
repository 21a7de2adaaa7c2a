"""Images sampled at any coordinates: ``resample`` (PyTorch's grid_sample) and ``affine``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgeship.errors import UnsupportedOpError
from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs


@op("resample")
def resample(call: Call) -> Outputs:
    """``x`` (B, C, H, W) at ``coordinates`` (B, h, w, 2), given as (x, y)."""
    return _sample(call, call.floats("x"), call.floats("coordinates"))


@op("affine")
def affine(call: Call) -> Outputs:
    """``x`` under a linear map of the coordinates, (B or 1, 6)."""
    x = call.floats("x")
    matrix = call.floats("transform_matrix").reshape(-1, 2, 3)
    height, width = call.integer("output_height"), call.integer("output_width")
    rows, columns = (torch.linspace(-1, 1, size) if size > 1 else torch.zeros(1) for size in (height, width))
    y, across = torch.meshgrid(rows, columns, indexing="ij")
    homogeneous = torch.stack([across, y, torch.ones_like(y)], dim=-1)
    coordinates = torch.einsum("hwk,bck->bhwc", homogeneous, matrix)
    return _sample(call, x, coordinates.expand(x.shape[0], -1, -1, -1))


def _sample(call: Call, x: Tensor, coordinates: Tensor) -> Tensor:
    """``x`` [B, C, H, W], ``coordinates`` [B, h, w, 2] -> [B, C, h, w]."""
    _, _, height, width = x.shape
    column = _to_pixels(call, coordinates[..., 0], width)
    row = _to_pixels(call, coordinates[..., 1], height)
    if call.text("sampling_mode", "bilinear") == "nearest":
        return _pick(call, x, torch.round(row), torch.round(column))
    top, left = torch.floor(row), torch.floor(column)
    down, right = (row - top).unsqueeze(1), (column - left).unsqueeze(1)
    upper = _pick(call, x, top, left) * (1 - right) + _pick(call, x, top, left + 1) * right
    lower = _pick(call, x, top + 1, left) * (1 - right) + _pick(call, x, top + 1, left + 1) * right
    return upper * (1 - down) + lower * down


def _to_pixels(call: Call, position: Tensor, size: int) -> Tensor:
    """Coordinates as positions between pixel centres, padding applied to those outside. [B, h, w]."""
    mode = call.text("coordinates_mode", "unnormalized")
    if mode != "unnormalized":
        unit = (position + 1) / 2 if mode == "normalized_minus_one_to_one" else position
        position = unit * (size - 1) if call.flag("align_corners") else unit * size - 0.5
    padding = call.text("padding_mode", "constant")
    if padding == "border":
        return position.clamp(0, size - 1)
    if padding == "reflection":
        return _reflect(position, 0.0, size - 1.0)
    if padding == "symmetric":
        return _reflect(position, -0.5, size - 0.5).clamp(0, size - 1)
    if padding == "constant":
        return position
    raise UnsupportedOpError(f"{call.operation.label}: padding_mode {padding}", fix="known: constant border "
                             "reflection symmetric")  # fmt: skip


def _reflect(position: Tensor, low: float, high: float) -> Tensor:
    """Positions thrown back at ``low`` and ``high``, element by element."""
    span = high - low
    if span <= 0:
        return torch.zeros_like(position)
    offset = torch.remainder(position - low, 2 * span)
    return low + torch.where(offset > span, 2 * span - offset, offset)


def _pick(call: Call, x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Pixels at whole positions (B, h, w); the padding value outside the image. [B, C, H, W] -> [B, C, h, w]."""
    batch, channels, height, width = x.shape
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).to(torch.int64)
    flat = place.reshape(batch, 1, -1).expand(-1, channels, -1)
    picked = torch.gather(x.reshape(batch, channels, -1), 2, flat).reshape(batch, channels, *row.shape[1:])
    return torch.where(inside.unsqueeze(1), picked, torch.tensor(call.number("padding_value", 0.0)))
