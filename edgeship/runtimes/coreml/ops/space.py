"""Moving elements between channels, space and batch of an image (n, C, H, W)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

from edgeship.runtimes.coreml.ops.convolution import pad_spatial
from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from edgeship.runtimes.coreml.ops.registry import Outputs


@op("pixel_shuffle")
def pixel_shuffle(call: Call) -> Outputs:
    """PyTorch's: the block's place varies fastest in the channels."""
    return F.pixel_shuffle(call.data("x"), call.integer("upscale_factor"))


@op("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Outputs:
    """The inverse of pixel_shuffle."""
    return F.pixel_unshuffle(call.data("x"), call.integer("downscale_factor"))


@op("depth_to_space")
def depth_to_space(call: Call) -> Outputs:
    """TensorFlow's: the block's place varies slowest in the channels."""
    x, b = call.data("x"), call.integer("block_size")
    n, c, h, w = x.shape
    return x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


@op("space_to_depth")
def space_to_depth(call: Call) -> Outputs:
    """The inverse of depth_to_space."""
    x, b = call.data("x"), call.integer("block_size")
    n, c, h, w = x.shape
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


@op("space_to_batch")
def space_to_batch(call: Call) -> Outputs:
    """Each place in a block of the padded image becomes an image of its own, in front of the batch."""
    top, bottom, left, right = call.integers("paddings")
    x = pad_spatial(call.data("x"), [(top, bottom), (left, right)])
    bh, bw = call.integers("block_shape")
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // bh, bh, w // bw, bw).permute(3, 5, 0, 1, 2, 4)
    return blocks.reshape(n * bh * bw, c, h // bh, w // bw)


@op("batch_to_space")
def batch_to_space(call: Call) -> Outputs:
    """The inverse of space_to_batch, cropped."""
    x = call.data("x")
    bh, bw = call.integers("block_shape")
    top, bottom, left, right = call.integers("crops")
    n, c, h, w = x.shape
    n //= bh * bw
    image = x.reshape(bh, bw, n, c, h, w).permute(2, 3, 4, 0, 5, 1).reshape(n, c, h * bh, w * bw)
    return image[:, :, top : h * bh - bottom, left : w * bw - right]
