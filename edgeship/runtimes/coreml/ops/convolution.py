"""Convolutions of one to three spatial dimensions, and how their padding is meant.

``same`` puts the odd element of padding after, ``same_lower`` before; both make ``ceil(size / stride)`` outputs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from edgeship.errors import UnsupportedOpError
from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def padding(call: Call, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(before, after) for each spatial dimension; ``kernel`` is the dilated size."""
    mode = call.text("pad_type", "valid")
    if mode == "valid":
        return [(0, 0)] * len(sizes)
    if mode == "custom":
        pad = call.optional_integers("pad") or [0] * (2 * len(sizes))
        return [(pad[2 * i], pad[2 * i + 1]) for i in range(len(sizes))]
    if mode in ("same", "same_lower"):
        pairs = []
        for size, window, stride in zip(sizes, kernel, strides, strict=True):
            total = max(0, (math.ceil(size / stride) - 1) * stride + window - size)
            small, large = total // 2, total - total // 2
            pairs.append((small, large) if mode == "same" else (large, small))
        return pairs
    raise UnsupportedOpError(f"{call.operation.label}: pad_type {mode}", fix="known: valid, same, same_lower, custom")


def pad_spatial(x: Tensor, pairs: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """``x`` with (before, after) elements added to each of its last dimensions; negative ones are cut off."""
    flat = [amount for pair in reversed(pairs) for amount in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


@op("conv")
def conv(call: Call) -> Outputs:
    """``x`` (n, C_in, *d) with ``weight`` (C_out, C_in / groups, *k)."""
    x, weight, bias = call.floats("x"), call.floats("weight"), call.optional_floats("bias")
    spatial = x.dim() - 2
    strides = call.optional_integers("strides") or [1] * spatial
    dilations = call.optional_integers("dilations") or [1] * spatial
    window = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    pairs = padding(call, x.shape[2:], window, strides)
    if all(before == after >= 0 for before, after in pairs):
        pads = [before for before, _ in pairs]
    else:
        x, pads = pad_spatial(x, pairs), [0] * spatial
    return _CONV[spatial](x, weight, bias, strides, pads, dilations, call.integer("groups", 1))


@op("conv_transpose")
def conv_transpose(call: Call) -> Outputs:
    """``x`` (n, C_in, *d) with ``weight`` (C_in, C_out / groups, *k), cut or extended to the output shape."""
    x, weight, bias = call.floats("x"), call.floats("weight"), call.optional_floats("bias")
    spatial = x.dim() - 2
    strides = call.optional_integers("strides") or [1] * spatial
    dilations = call.optional_integers("dilations") or [1] * spatial
    groups = call.integer("groups", 1)
    full = _CONV_TRANSPOSE[spatial](x, weight, None, strides, 0, 0, groups, dilations)
    mode = call.text("pad_type", "valid")
    pad = call.optional_integers("pad") if mode == "custom" else None
    wanted = call.optional_integers("output_shape")
    pairs = []
    for i in range(spatial):
        have, want = full.shape[2 + i], full.shape[2 + i]
        before = pad[2 * i] if pad else 0
        if wanted is not None:
            want = wanted[2 + i]
        elif mode in ("same", "same_lower"):
            want = x.shape[2 + i] * strides[i]
        elif pad:
            want = have - pad[2 * i] - pad[2 * i + 1]
        if mode in ("same", "same_lower"):
            excess = max(0, have - want)
            before = excess // 2 if mode == "same" else excess - excess // 2
        pairs.append((-before, want - have + before))
    result = pad_spatial(full, pairs)
    return result if bias is None else result + bias.reshape(1, -1, *[1] * spatial)


@op("conv_quantized")
def conv_quantized(call: Call) -> Outputs:
    """A convolution whose weight is ``weight * quant_scale + quant_bias``."""
    if call.text("quantization_type", "linear") != "linear":
        raise UnsupportedOpError(f"{call.operation.label}: a palette", fix="use constexpr_lut_to_dense and conv")
    weight = call.floats("weight")
    shape = [-1, *[1] * (weight.dim() - 1)]
    weight = weight * call.floats("quant_scale").reshape(shape) + call.floats("quant_bias").reshape(shape)
    return conv(_with(call, "weight", weight))


def _with(call: Call, name: str, value: torch.Tensor) -> Call:
    """``call`` with another tensor for one argument; any shape."""
    return Call(call.operation, {**call.arguments, name: (value,)}, call.opset, call.run_block, call.states)
