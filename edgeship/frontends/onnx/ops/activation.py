"""Activation functions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.registry import op
from edgeship.frontends.onnx.values import is_constant

Tensor = torch.Tensor

# The defaults that ONNX gives Selu, written there with all their digits.
_SELU_ALPHA = 1.67326319217681884765625
_SELU_GAMMA = 1.05070102214813232421875


def _plain(name: str, function: Callable[[Tensor], Tensor]) -> None:
    """Import ``name`` as a torch function of any shape."""

    @op(name)
    def run(call: OpCall) -> Tensor:
        """Element by element."""
        return function(call.x(0))


_plain("Relu", torch.relu)
_plain("Sigmoid", torch.sigmoid)
_plain("Tanh", torch.tanh)
_plain("Softplus", F.softplus)
_plain("Softsign", F.softsign)
_plain("Mish", F.mish)
_plain("HardSwish", F.hardswish)


@op("Swish")
def swish(call: OpCall) -> Tensor:
    """`x * sigmoid(alpha * x)`. Any shape."""
    x, alpha = call.x(0), call.attr_float("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else torch.mul(x, torch.sigmoid(torch.mul(x, alpha)))


@op("Gelu")
def gelu(call: OpCall) -> Tensor:
    """Exact, or with the tanh approximation. Any shape."""
    return F.gelu(call.x(0), approximate=call.attr_text("approximate", "none"))


@op("LeakyRelu")
def leaky_relu(call: OpCall) -> Tensor:
    """Slope `alpha` below 0. Any shape."""
    return F.leaky_relu(call.x(0), call.attr_float("alpha", 0.01))


@op("Elu")
def elu(call: OpCall) -> Tensor:
    """`alpha * (exp(x) - 1)` below 0. Any shape."""
    return F.elu(call.x(0), call.attr_float("alpha", 1.0))


@op("Celu")
def celu(call: OpCall) -> Tensor:
    """`alpha * (exp(x / alpha) - 1)` below 0. Any shape."""
    return F.celu(call.x(0), call.attr_float("alpha", 1.0))


@op("Selu")
def selu(call: OpCall) -> Tensor:
    """Scaled Elu; torch has it for the standard constants only. Any shape."""
    x = call.x(0)
    alpha, gamma = call.attr_float("alpha", _SELU_ALPHA), call.attr_float("gamma", _SELU_GAMMA)
    if math.isclose(alpha, _SELU_ALPHA, rel_tol=1e-6) and math.isclose(gamma, _SELU_GAMMA, rel_tol=1e-6):
        return F.selu(x)
    return torch.mul(F.elu(x, alpha), gamma)


@op("HardSigmoid")
def hard_sigmoid(call: OpCall) -> Tensor:
    """`clip(alpha * x + beta, 0, 1)`. Any shape."""
    x, alpha, beta = call.x(0), call.attr_float("alpha", 0.2), call.attr_float("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(torch.add(torch.mul(x, alpha), beta), 0.0, 1.0)


@op("ThresholdedRelu")
def thresholded_relu(call: OpCall) -> Tensor:
    """0 up to `alpha`. Any shape."""
    return F.threshold(call.x(0), call.attr_float("alpha", 1.0), 0.0)


@op("Shrink")
def shrink(call: OpCall) -> Tensor:
    """Towards 0 by `bias`, and 0 within `lambd` of it. Any shape."""
    x, limit, bias = call.x(0), call.attr_float("lambd", 0.5), call.attr_float("bias", 0.0)
    zero = torch.zeros_like(x)
    below = torch.where(x < -limit, torch.add(x, bias), zero)
    return torch.where(x > limit, torch.sub(x, bias), below).to(x.dtype)


@op("PRelu")
def prelu(call: OpCall) -> Tensor:
    """A learned slope below 0, one for all or one for each channel."""
    x, slope = call.x(0), call.weight(1)
    per_channel = slope.dim() == x.dim() - 1 >= 1 and slope.numel() == slope.shape[0]
    if x.is_floating_point() and is_constant(slope):
        if slope.numel() == 1:
            return F.prelu(x, call.constants.derive(slope, "[1]", lambda t: t.reshape(1)))
        if per_channel and x.dim() > 1 and slope.numel() == x.shape[1]:
            return F.prelu(x, call.constants.derive(slope, "flat", lambda t: t.reshape(-1)))
    if call.opset < 7 and slope.dim() == 1 and x.dim() > 1:
        slope = slope.reshape((-1,) + (1,) * (x.dim() - 2))
    return torch.where(x < 0, torch.mul(x, slope), x)


@op("Softmax", "LogSoftmax", "Hardmax")
def softmax_flattened(call: OpCall) -> Tensor:
    """Before opset 13: over everything from ``axis`` on, as if that were one axis."""
    x = call.x(0)
    axis = call.attr_int("axis", 1)
    axis = x.dim() if axis == x.dim() else call.axis(axis, x.dim())
    function = _function(call.node.op_type)
    if axis < x.dim() and math.prod(x.shape[axis + 1 :]) == 1:
        return function(x, axis)
    flat = x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
    return function(flat, 1).reshape(x.shape)


@op("Softmax", "LogSoftmax", "Hardmax", since=13)
def softmax(call: OpCall) -> Tensor:
    """Over one axis, since opset 13."""
    x = call.x(0)
    return _function(call.node.op_type)(x, call.axis(call.attr_int("axis", -1), x.dim()))


def _function(op_type: str) -> Callable[[Tensor, int], Tensor]:
    """The torch function of ``(x, axis)``; the shape stays."""
    if op_type == "Softmax":
        return torch.softmax
    return torch.log_softmax if op_type == "LogSoftmax" else _hardmax


def _hardmax(x: Tensor, axis: int) -> Tensor:
    """1 at the first largest along ``axis``, 0 elsewhere; the shape of ``x``."""
    index = torch.argmax(x, axis, keepdim=True)
    shape = [1] * x.dim()
    shape[axis] = x.shape[axis]
    return torch.eq(index, torch.arange(x.shape[axis]).reshape(shape)).to(x.dtype)
