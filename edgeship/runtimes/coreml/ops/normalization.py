"""Normalizations. Statistics are taken in float32, as the parameters may be (iOS 17)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs


def _scale_and_shift(call: Call, x: Tensor, shape: list[int]) -> Tensor:
    """``x * gamma + beta``; ``shape`` makes both broadcast to ``x``."""
    gamma, beta = call.optional_floats("gamma"), call.optional_floats("beta")
    if gamma is not None:
        x = x * gamma.reshape(shape)
    return x if beta is None else x + beta.reshape(shape)


def _channel_shape(x: Tensor) -> list[int]:
    """The shape in which one number a channel broadcasts to ``x`` [N, C, ...]."""
    return [1, x.shape[1], *[1] * (x.dim() - 2)]


@op("batch_norm")
def batch_norm(call: Call) -> Outputs:
    """With given mean and variance by channel (axis 1)."""
    x = call.floats("x")
    shape = _channel_shape(x)
    deviation = torch.sqrt(call.floats("variance") + call.number("epsilon", 1e-5)).reshape(shape)
    return _scale_and_shift(call, (x - call.floats("mean").reshape(shape)) / deviation, shape)


@op("instance_norm")
def instance_norm(call: Call) -> Outputs:
    """By image and channel over the spatial axes."""
    x = call.floats("x")
    return _scale_and_shift(call, _standardize(x, list(range(2, x.dim())), call), _channel_shape(x))


@op("layer_norm")
def layer_norm(call: Call) -> Outputs:
    """Over ``axes``; gamma and beta have the shape of those axes."""
    x = call.floats("x")
    axes = call.axes(x.dim())
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    return _scale_and_shift(call, _standardize(x, axes, call), shape)


def _standardize(x: Tensor, axes: list[int], call: Call) -> Tensor:
    """Mean 0 and variance 1 along ``axes``."""
    centred = x - x.mean(dim=axes, keepdim=True)
    variance = (centred * centred).mean(dim=axes, keepdim=True)
    return centred / torch.sqrt(variance + call.number("epsilon", 1e-5))


@op("l2_norm")
def l2_norm(call: Call) -> Outputs:
    """Each image (the last three axes) divided by the root of its sum of squares."""
    x = call.floats("x")
    squares = (x * x).sum(dim=[-3, -2, -1], keepdim=True)
    return x / torch.sqrt(squares + call.number("epsilon", 1e-6))


@op("local_response_norm")
def local_response_norm(call: Call) -> Outputs:
    """Each element divided by ``(k + alpha mean(x^2 over size channels))^beta``."""
    return F.local_response_norm(
        call.floats("x"),
        call.integer("size"),
        alpha=call.number("alpha", 1e-4),
        beta=call.number("beta", 0.75),
        k=call.number("k", 1.0),
    )
