"""Average, maximum and L2 pooling of one to three spatial dimensions, with PyTorch's meaning of ``ceil_mode``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from edgeship.errors import UnsupportedOpError
from edgeship.runtimes.coreml.ops.convolution import pad_spatial, padding
from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs

_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMUM = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class _Window:
    """Kernel, strides and padding; ``overhang`` is what a last, incomplete window needs beyond the padding."""

    def __init__(self, call: Call, x: Tensor) -> None:
        """``x`` [N, C, ...space]."""
        self.kernel = call.integers("kernel_sizes")
        spatial = len(self.kernel)
        if x.dim() != spatial + 2 or spatial not in _AVERAGE:
            raise UnsupportedOpError(f"{call.operation.label}: rank {x.dim()}", fix="pools take rank 3, 4 or 5")
        self.strides = call.optional_integers("strides") or [1] * spatial
        sizes = list(x.shape[2:])
        self.pad = padding(call, sizes, self.kernel, self.strides)
        self.overhang = [(0, 0)] * spatial
        if call.flag("ceil_mode"):
            for i, (before, after) in enumerate(self.pad):
                padded = sizes[i] + before + after
                count = math.ceil((padded - self.kernel[i]) / self.strides[i]) + 1
                # A window may not start in the padding after the input.
                if before + after > 0 and (count - 1) * self.strides[i] >= sizes[i] + (before + after) / 2:
                    count -= 1
                self.overhang[i] = (0, max(0, (count - 1) * self.strides[i] + self.kernel[i] - padded))

    def extend(self, x: Tensor, value: float) -> Tensor:
        """``x`` [N, C, ...space] with padding around it, and behind it what windows reach beyond."""
        return pad_spatial(pad_spatial(x, self.pad, value), self.overhang, value)


@op("max_pool")
def max_pool(call: Call) -> Outputs:
    """The largest element of each window; padding never wins."""
    x = call.floats("x")
    window = _Window(call, x)
    pooled: Tensor = _MAXIMUM[len(window.kernel)](window.extend(x, -math.inf), window.kernel, window.strides)
    return pooled


@op("avg_pool")
def avg_pool(call: Call) -> Outputs:
    """The mean of each window; ``exclude_padding_from_average`` divides by the real elements only."""
    x = call.floats("x")
    window = _Window(call, x)
    average = _AVERAGE[len(window.kernel)]
    pooled = average(window.extend(x, 0.0), window.kernel, window.strides)
    counted = torch.ones(1, 1, *x.shape[2:])
    exclude = call.flag("exclude_padding_from_average")
    if (exclude and any(map(any, window.pad))) or any(map(any, window.overhang)):
        counted = pad_spatial(counted, window.pad, 0.0 if exclude else 1.0)
        pooled = pooled / average(pad_spatial(counted, window.overhang), window.kernel, window.strides)
    return pooled


@op("l2_pool")
def l2_pool(call: Call) -> Outputs:
    """The square root of the sum of squares in each window."""
    x = call.floats("x")
    window = _Window(call, x)
    mean = _AVERAGE[len(window.kernel)](window.extend(x * x, 0.0), window.kernel, window.strides)
    return torch.sqrt(mean * math.prod(window.kernel))
