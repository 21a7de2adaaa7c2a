"""Affine quantization of activations (iOS 17)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs


def _along(call: Call, name: str, rank: int) -> Tensor:
    """A scalar, or a vector laid along ``axis``."""
    parameter = call.floats(name)
    if parameter.dim() == 0 or (parameter.numel() == 1 and not call.has("axis")):
        return parameter.reshape(())
    axis = call.axis("axis", None, rank)
    return parameter.reshape([-1 if i == axis else 1 for i in range(rank)])


@op("quantize")
def quantize(call: Call) -> Outputs:
    """``clip(round(x / scale) + zero_point)``; halves round to even."""
    x = call.floats("input")
    quantized = torch.round(x / _along(call, "scale", x.dim()))
    if call.has("zero_point"):
        quantized = quantized + _along(call, "zero_point", x.dim())
    bounds = torch.iinfo(torch.uint8 if call.outputs[0].type.dtype == "uint8" else torch.int8)
    return torch.nan_to_num(quantized, nan=0.0).clamp(bounds.min, bounds.max)


@op("dequantize")
def dequantize(call: Call) -> Outputs:
    """``scale (x - zero_point)``."""
    x = call.floats("input")
    if call.has("zero_point"):
        x = x - _along(call, "zero_point", x.dim())
    return x * _along(call, "scale", x.dim())
