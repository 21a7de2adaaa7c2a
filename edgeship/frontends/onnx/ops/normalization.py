"""Normalizations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.dtypes import TORCH_DTYPE
from edgeship.frontends.onnx.registry import Result, op

Tensor = torch.Tensor


@op("BatchNormalization")
def batch_norm(call: OpCall) -> Result:
    """Inference: with the running statistics that the file carries."""
    trains = call.attr_int("training_mode", 0) if call.opset >= 14 else 0
    if trains or (call.opset < 7 and not call.attr_int("is_test", 0) and call.n_outputs > 1):
        raise call.refuse("it is in training mode", fix="export the model in eval mode")
    if call.opset < 9 and not call.attr_int("spatial", 1):
        raise call.refuse("spatial=0 (statistics for each activation) is not imported")
    x = call.x(0)
    scale, bias, mean, variance = (call.weight(index) for index in (1, 2, 3, 4))
    epsilon = call.attr_float("epsilon", 1e-5)
    if not x.dtype == scale.dtype == mean.dtype:
        x_wide = x.to(mean.dtype)
        wide = F.batch_norm(x_wide, mean, variance, scale.to(mean.dtype), bias.to(mean.dtype), False, 0.0, epsilon)
        return wide.to(x.dtype)
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)


@op("InstanceNormalization")
def instance_norm(call: OpCall) -> Tensor:
    """Statistics for each picture and channel."""
    x = call.x(0)
    return F.instance_norm(x, weight=call.weight(1), bias=call.weight(2), eps=call.attr_float("epsilon", 1e-5))


@op("LayerNormalization")
def layer_norm(call: OpCall) -> Result:
    """One call where only Y is asked for; Mean and InvStdDev are computed by hand."""
    x, scale, bias = call.x(0), call.weight(1), call.optional_weight(2)
    axis = call.axis(call.attr_int("axis", -1), x.dim())
    epsilon = call.attr_float("epsilon", 1e-5)
    shape = tuple(x.shape[axis:])
    fits = tuple(scale.shape) == shape and (bias is None or tuple(bias.shape) == shape)
    if fits and not call.wants(1) and not call.wants(2):
        return F.layer_norm(x, shape, scale, bias, epsilon)
    # By hand, because Mean and InvStdDev are asked for too: [..., 1, 1].
    axes = list(range(axis, x.dim()))
    wide = x.to(TORCH_DTYPE[call.attr_int("stash_type", 1)])
    mean = torch.mean(wide, axes, keepdim=True)
    centred = torch.sub(wide, mean)
    inverse = torch.rsqrt(torch.add(torch.mean(torch.mul(centred, centred), axes, keepdim=True), epsilon))
    result = torch.mul(torch.mul(centred, inverse).to(x.dtype), scale)
    return (result if bias is None else torch.add(result, bias)), mean, inverse


@op("RMSNormalization")
def rms_norm(call: OpCall) -> Tensor:
    """One call where no wider type is asked for. ``scale`` has the shape of the axes from ``axis`` on."""
    x, scale = call.x(0), call.weight(1)
    axis = call.axis(call.attr_int("axis", -1), x.dim())
    epsilon = call.attr_float("epsilon", 1e-5)
    shape = tuple(x.shape[axis:])
    stash = TORCH_DTYPE[call.attr_int("stash_type", 1)]
    if tuple(scale.shape) == shape and x.dtype == stash:
        return F.rms_norm(x, shape, scale, epsilon)
    wide = x.to(stash)
    mean = torch.mean(torch.mul(wide, wide), list(range(axis, x.dim())), keepdim=True)
    return torch.mul(torch.mul(wide, torch.rsqrt(torch.add(mean, epsilon))).to(x.dtype), scale)


@op("GroupNormalization", since=18)
def group_norm_grouped(call: OpCall) -> Tensor:
    """Opset 18 gives one scale and bias to a group. ``x`` [N, C, ...], scale and bias [groups]."""
    x, groups = call.x(0), call.attr_int("num_groups")
    # [N, C, ...] -> [N, groups, C / groups, ...]
    per_group = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    normal = F.group_norm(x, groups, None, None, call.attr_float("epsilon", 1e-5))
    shape = (1, groups, *(1 for _ in per_group[2:]))
    scaled = torch.mul(normal.reshape(per_group), call.weight(1).reshape(shape))
    return torch.add(scaled, call.weight(2).reshape(shape)).reshape(x.shape)


@op("GroupNormalization", since=21)
def group_norm(call: OpCall) -> Tensor:
    """One scale and bias for each channel."""
    groups, epsilon = call.attr_int("num_groups"), call.attr_float("epsilon", 1e-5)
    return F.group_norm(call.x(0), groups, call.weight(1), call.weight(2), epsilon)


@op("LRN")
def local_response_norm(call: OpCall) -> Tensor:
    """Sum of squares over ``size`` channels around each; an even size has its longer side behind."""
    x, size = call.x(0), call.attr_int("size")
    alpha, beta, bias = call.attr_float("alpha", 1e-4), call.attr_float("beta", 0.75), call.attr_float("bias", 1.0)
    if size < 1:
        raise call.broken(f"size is {size}")
    # [N, C, ...] -> [N, 1, C, space]: channels become an axis that a pool slides along
    flat = torch.mul(x, x).reshape(x.shape[0], 1, x.shape[1], -1)
    padded = F.pad(flat, (0, 0, (size - 1) // 2, size // 2))
    means = F.avg_pool2d(padded, (size, 1), stride=1).reshape(x.shape)
    return torch.div(x, torch.pow(torch.add(torch.mul(means, alpha), bias), beta))


@op("MeanVarianceNormalization")
def mean_variance_norm(call: OpCall) -> Tensor:
    """To mean 0 and deviation 1 over `axes`."""
    x, axes = call.x(0), call.attr_ints("axes", (0, 2, 3))
    centred = torch.sub(x, torch.mean(x, axes, keepdim=True))
    deviation = torch.sqrt(torch.mean(torch.mul(centred, centred), axes, keepdim=True))
    return torch.div(centred, torch.add(deviation, 1e-9))


@op("LpNormalization")
def lp_norm(call: OpCall) -> Tensor:
    """To length 1 by the 1- or 2-norm. Any shape, along ``axis``."""
    x, p = call.x(0), call.attr_int("p", 2)
    axis = call.axis(call.attr_int("axis", -1), x.dim())
    if p == 1:
        norm = torch.sum(torch.abs(x), axis, keepdim=True)
    else:
        norm = torch.sqrt(torch.sum(torch.mul(x, x), axis, keepdim=True))
    # The specification has 0 where the norm is 0.
    return torch.where(torch.eq(norm, 0.0), torch.zeros_like(x), torch.div(x, norm))
