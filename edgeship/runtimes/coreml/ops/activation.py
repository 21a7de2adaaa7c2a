"""Activations; ``alpha`` and ``beta`` may be of another float type than ``x`` (iOS 17)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from edgeship.errors import UnsupportedOpError
from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs


@op("relu")
def relu(call: Call) -> Outputs:
    """``max(x, 0)``."""
    return torch.relu(call.numbers("x"))


@op("relu6")
def relu6(call: Call) -> Outputs:
    """``min(max(x, 0), 6)``."""
    return call.floats("x").clamp(0, 6)


@op("sigmoid")
def sigmoid(call: Call) -> Outputs:
    """``1 / (1 + exp(-x))``."""
    return torch.sigmoid(call.floats("x"))


@op("silu")
def silu(call: Call) -> Outputs:
    """``x sigmoid(x)``."""
    return F.silu(call.floats("x"))


@op("gelu")
def gelu(call: Call) -> Outputs:
    """Exact, or by the tanh or the sigmoid approximation."""
    x = call.floats("x")
    mode = call.text("mode", "EXACT")
    if mode == "EXACT":
        return F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise UnsupportedOpError(f"{call.operation.label}: mode {mode}", fix="known: EXACT, TANH_, SIGMOID_APPROXIMATION")


@op("softplus")
def softplus(call: Call) -> Outputs:
    """``log(1 + exp(x))``."""
    x = call.floats("x")
    return torch.logaddexp(x, torch.zeros_like(x))


@op("softplus_parametric")
def softplus_parametric(call: Call) -> Outputs:
    """``alpha_c log(1 + exp(beta_c x))`` by channel (axis 1)."""
    x = call.floats("x")
    y = _by_channel(call, "beta", x) * x
    return _by_channel(call, "alpha", x) * torch.logaddexp(y, torch.zeros_like(y))


@op("softsign")
def softsign(call: Call) -> Outputs:
    """``x / (1 + |x|)``."""
    return F.softsign(call.floats("x"))


@op("elu")
def elu(call: Call) -> Outputs:
    """``x`` above 0, else ``alpha (exp(x) - 1)``."""
    x = call.floats("x")
    return torch.where(x > 0, x, call.floats("alpha") * torch.expm1(torch.clamp(x, max=0)))


@op("leaky_relu")
def leaky_relu(call: Call) -> Outputs:
    """``x`` from 0 up, else ``alpha x``."""
    x = call.floats("x")
    return torch.where(x >= 0, x, call.floats("alpha") * x)


@op("prelu")
def prelu(call: Call) -> Outputs:
    """``x`` above 0, else ``alpha_c x`` by channel (axis 1)."""
    x = call.floats("x")
    return torch.where(x > 0, x, _by_channel(call, "alpha", x) * x)


@op("clamped_relu")
def clamped_relu(call: Call) -> Outputs:
    """``min(beta, x)`` from 0 up, else ``min(beta, alpha x)``."""
    x = call.floats("x")
    return torch.minimum(torch.where(x >= 0, x, call.floats("alpha") * x), call.floats("beta"))


@op("thresholded_relu")
def thresholded_relu(call: Call) -> Outputs:
    """``x`` from ``alpha`` up, else 0."""
    x = call.floats("x")
    return torch.where(x >= call.floats("alpha"), x, torch.zeros_like(x))


@op("linear_activation")
def linear_activation(call: Call) -> Outputs:
    """``alpha x + beta``."""
    return call.floats("alpha") * call.floats("x") + call.floats("beta")


@op("scaled_tanh")
def scaled_tanh(call: Call) -> Outputs:
    """``alpha tanh(beta x)``."""
    return call.floats("alpha") * torch.tanh(call.floats("beta") * call.floats("x"))


@op("sigmoid_hard")
def sigmoid_hard(call: Call) -> Outputs:
    """``min(max(alpha x + beta, 0), 1)``."""
    return (call.floats("alpha") * call.floats("x") + call.floats("beta")).clamp(0, 1)


@op("softmax")
def softmax(call: Call) -> Outputs:
    """Over one axis, the maximum subtracted first."""
    x = call.floats("x")
    return torch.softmax(x, dim=call.axis("axis", -1, x.dim()))


def _by_channel(call: Call, name: str, x: Tensor) -> Tensor:
    """A parameter [C], shaped to multiply ``x`` [N, C, ...]."""
    parameter = call.floats(name)
    return parameter.reshape(1, -1, *[1] * (x.dim() - 2)) if x.dim() > 1 else parameter
