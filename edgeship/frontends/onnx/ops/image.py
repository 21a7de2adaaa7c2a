"""Operators that sample pictures: grids, regions, deformed kernels, columns."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.registry import op
from edgeship.program.regions import align_regions

Tensor = torch.Tensor

_GRID_MODE = {
    "linear": "bilinear",
    "bilinear": "bilinear",
    "nearest": "nearest",
    "cubic": "bicubic",
    "bicubic": "bicubic",
}


@op("GridSample")
def grid_sample(call: OpCall) -> Tensor:
    """Grid places are -1..1; torch has the same modes and paddings.

    ``x`` [N, C, H, W], ``grid`` [N, out H, out W, 2] -> [N, C, out H, out W]; likewise in 3-D.
    """
    x, grid = call.x(0), call.x(1)
    mode = _GRID_MODE[call.attr_text("mode", "bilinear")]
    if x.dim() not in (4, 5) or (x.dim() == 5 and mode == "bicubic"):
        raise call.refuse(f"mode {mode} on {x.dim() - 2} spatial axes")
    align = bool(call.attr_int("align_corners", 0))
    return F.grid_sample(x, grid, mode, call.attr_text("padding_mode", "zeros"), align)


@op("AffineGrid")
def affine_grid(call: OpCall) -> Tensor:
    """Places of a regular grid, moved by `theta`.

    ``theta`` [N, 2, 3] -> [N, H, W, 2]; in 3-D [N, 3, 4] -> [N, D, H, W, 3].
    """
    size = call.const_ints(1, "size")
    call.check_size(size)
    align = bool(call.attr_int("align_corners", 0))
    axes = []
    for length in reversed(size[2:]):
        step = torch.arange(length, dtype=torch.float64)
        edge = torch.linspace(-1, 1, length, dtype=torch.float64)
        axes.append(edge if align else (2 * step + 1) / length - 1)
    mesh = torch.meshgrid(*reversed(axes), indexing="ij")
    points = torch.stack([*reversed(mesh), torch.ones(tuple(size[2:]), dtype=torch.float64)], -1)
    theta = call.x(0)
    flat = torch.matmul(points.reshape(1, -1, len(axes) + 1).to(theta.dtype), torch.transpose(theta, 1, 2))
    return torch.reshape(flat, (size[0], *size[2:], len(axes)))


@op("Col2Im")
def col2im(call: OpCall) -> Tensor:
    """Sums columns back into pictures; 2-D with even padding is torch's fold."""
    x, spatial, block = call.x(0), call.const_ints(1, "image_shape"), call.const_ints(2, "block_shape")
    rank = len(spatial)
    strides = call.attr_ints("strides", (1,) * rank)
    dilations = call.attr_ints("dilations", (1,) * rank)
    pads = call.attr_ints("pads", (0,) * (2 * rank))
    if min((*strides, *dilations, *block), default=0) < 1:
        raise call.broken("its strides, dilations or block do not fit")
    if rank == 2 and pads[:rank] == pads[rank:]:
        return F.fold(x, tuple(spatial), tuple(block), tuple(dilations), tuple(pads[:rank]), tuple(strides))
    channels = x.shape[1] // math.prod(block)
    padded = [spatial[a] + pads[a] + pads[a + rank] for a in range(rank)]
    call.check_size((x.shape[0], channels, *padded))
    counts = [(padded[a] - dilations[a] * (block[a] - 1) - 1) // strides[a] + 1 for a in range(rank)]
    # Where each number of a column lies in the padded picture: [...block, ...counts].
    place = torch.zeros([*block, *counts], dtype=torch.int64)
    for axis in range(rank):
        kernel = torch.arange(block[axis]) * dilations[axis]
        window = torch.arange(counts[axis]) * strides[axis]
        view_kernel, view_window = [1] * (2 * rank), [1] * (2 * rank)
        view_kernel[axis], view_window[axis + rank] = -1, -1
        offset = kernel.reshape(view_kernel) + window.reshape(view_window)
        place = place + offset * math.prod(padded[axis + 1 :])
    # [N, C * block, counts] -> [N, C, block * counts]
    columns = torch.reshape(x, (x.shape[0], channels, place.numel()))
    empty = torch.zeros((x.shape[0], channels, math.prod(padded)), dtype=x.dtype)
    summed = torch.reshape(torch.index_add(empty, 2, place.reshape(-1), columns), (*x.shape[:1], channels, *padded))
    crop = tuple(slice(pads[a], pads[a] + spatial[a]) for a in range(rank))
    return summed[(slice(None), slice(None), *crop)]


@op("RoiAlign")
def roi_align(call: OpCall) -> Tensor:
    """Mean (or largest) of a fixed grid of bilinear samples in each bin of each region.

    ``x`` [N, C, H, W], ``rois`` [R, 4], ``batch`` [R] -> [R, C, height, width].
    """
    x, rois, batch = call.x(0), call.x(1), call.x(2).to(torch.int64)
    height, width = call.attr_int("output_height", 1), call.attr_int("output_width", 1)
    ratio, scale = call.attr_int("sampling_ratio", 0), call.attr_float("spatial_scale", 1.0)
    half_pixel = call.opset >= 16 and call.attr_text("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    if ratio < 1:
        raise call.refuse("sampling_ratio 0 makes the number of samples depend on the data")
    if min(height, width) < 1:
        raise call.broken(f"an output of {height}x{width}")
    largest = call.attr_text("mode", "avg") == "max"
    return align_regions(
        x, rois, batch, (height, width), ratio=ratio, scale=scale, half_pixel=half_pixel, largest=largest
    )


@op("DeformConv", since=19)
def deform_conv(call: OpCall) -> Tensor:
    """Bilinear samples at displaced kernel places, then one product with the kernel."""
    x, weight, offset = call.x(0), call.weight(1), call.x(2)
    bias, mask = call.optional_weight(3), call.optional(4)
    if x.dim() != 4:
        raise call.refuse("only pictures (2 spatial axes) are imported")
    kernel = call.attr_ints("kernel_shape", tuple(weight.shape[2:]))
    strides, dilations = call.attr_ints("strides", (1, 1)), call.attr_ints("dilations", (1, 1))
    pads, groups = call.attr_ints("pads", (0, 0, 0, 0)), call.attr_int("group", 1)
    batch, channels, height, width = x.shape
    parts = call.attr_int("offset_group", 1)
    rows, columns = offset.shape[2], offset.shape[3]
    taps = kernel[0] * kernel[1]
    # [N, parts * taps * 2, rows, columns] -> [N, parts, taps, (y, x), rows, columns]
    moved = torch.reshape(offset, (batch, parts, taps, 2, rows, columns))
    tap_y = torch.arange(kernel[0]).repeat_interleave(kernel[1]) * dilations[0] - pads[0]
    tap_x = torch.arange(kernel[1]).repeat(kernel[0]) * dilations[1] - pads[1]
    # Where each tap lies without its offset: [taps, rows, 1] and [taps, 1, columns].
    base_y = tap_y.reshape(-1, 1, 1) + (torch.arange(rows) * strides[0]).reshape(1, -1, 1)
    base_x = tap_x.reshape(-1, 1, 1) + (torch.arange(columns) * strides[1]).reshape(1, 1, -1)
    y = torch.add(torch.select(moved, 3, 0), base_y.to(x.dtype))
    z = torch.add(torch.select(moved, 3, 1), base_x.to(x.dtype))
    grid = torch.stack([_normal(z, width), _normal(y, height)], -1)
    # [N, parts, taps, rows, columns, 2] -> [N * parts, taps * rows, columns, 2]
    flat_grid = torch.reshape(grid, (batch * parts, taps * rows, columns, 2))
    split = torch.reshape(x, (batch * parts, channels // parts, height, width))
    sampled = F.grid_sample(split, flat_grid, "bilinear", "zeros", True)
    sampled = torch.reshape(sampled, (batch, parts, channels // parts, taps, rows, columns))
    if mask is not None:
        sampled = torch.mul(sampled, torch.reshape(mask, (batch, parts, 1, taps, rows, columns)))
    # A convolution with one tap: channels and kernel places become the channels of a 1x1 kernel.
    stacked = torch.reshape(sampled, (batch, channels * taps, rows, columns))
    flat_weight = torch.reshape(weight, (weight.shape[0], weight.shape[1] * taps, 1, 1))
    return F.conv2d(stacked, flat_weight, bias, groups=groups)


def _normal(place: Tensor, size: int) -> Tensor:
    """Pixel index to the -1..1 of grid_sample with aligned corners. Any shape."""
    if size == 1:
        # One pixel: any step away from it must leave the picture, which 2x does.
        return torch.mul(place, 2.0)
    return torch.sub(torch.mul(place, 2.0 / (size - 1)), 1.0)
