"""Convolutions that a converter lacks, in those that it has. Each is a function of torch operators, see `operators`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from edgeship.program.windows import one_an_axis

if TYPE_CHECKING:
    from torch import Tensor


def transposed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
    dilation: Sequence[int] = (1,),
    *,
    grouped: bool = False,
    dilated: bool = False,
    spread: bool = False,
) -> Tensor:
    """A transposed convolution as a whole one, whose edges are cut off or filled up.

    A dilated one spreads its input with zeros, and is a plain convolution with the kernel turned round.

    Args:
        grouped, dilated: whether the runtime has that; else groups are convolved one by one.
        spread: the runtime has no transposed convolution at all, and a plain one with groups.
    """
    rank = weight.dim() - 2
    stride, padding = one_an_axis(stride, rank), one_an_axis(padding, rank)
    output_padding, dilation = one_an_axis(output_padding, rank), one_an_axis(dilation, rank)
    # Lengths by axis of space: of the result before its edges are cut, and after.
    whole: list[int] = []
    wanted: list[int] = []
    for axis in range(rank):
        reach = dilation[axis] * (weight.shape[axis + 2] - 1) + 1
        whole.append((x.shape[axis + 2] - 1) * stride[axis] + reach)
        wanted.append(whole[axis] - 2 * padding[axis] + output_padding[axis])
    fills = any(padding[axis] + wanted[axis] > whole[axis] for axis in range(rank))
    # What is filled up holds the bias too, so there it is added last.
    early = None if fills else bias
    # Without dilation, or with a runtime that has it, nothing has to be spread.
    plain = dilated or all(step == 1 for step in dilation)
    if spread:
        made, early = _spread_convolution(x, _turned(weight, groups), stride, dilation, groups), None
    elif (grouped or groups == 1) and plain:
        made = TRANSPOSED[rank - 1](x, weight, early, stride, groups=groups, dilation=dilation)
    else:
        made, early = _by_groups(x, weight, stride, dilation, groups, plain), None
    for place in range(rank):
        axis = place + 2
        kept = min(wanted[place], whole[place] - padding[place])
        if padding[place] or kept < whole[place]:
            made = made.narrow(axis, padding[place], kept)
        if wanted[place] > kept:
            made = functional.pad(made, [0, 0] * (rank - 1 - place) + [0, wanted[place] - kept])
    return made if bias is None or early is not None else made + bias.reshape(-1, *[1] * rank)


PLAIN = (functional.conv1d, functional.conv2d, functional.conv3d)
TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)


def _by_groups(
    x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int, plain: bool
) -> Tensor:
    function = TRANSPOSED[weight.dim() - 3]
    made = []
    # On three axes: a converter that lays images channels last would turn the slices of a weight too.
    flat, width = weight.flatten(2), x.shape[1] // groups
    for group in range(groups):
        part, rows = (given.narrow(axis, group * width, width) for given, axis in ((x, 1), (flat, 0)))
        kernel = (*rows.shape[:2], *weight.shape[2:])
        if plain:
            made.append(function(part, rows.reshape(kernel), stride=list(stride), dilation=list(dilation)))
        else:
            made.append(_spread_convolution(part, _turned(rows.reshape(kernel), 1), stride, dilation, 1))
    return made[0] if groups == 1 else torch.cat(made, 1)


def _turned(weight: Tensor, groups: int) -> Tensor:
    """The plain convolution's weight, from the last to the first: [in, out / groups, *k] -> [out, in / groups, *k]."""
    inner, outer, *kernel = weight.shape
    # [in, out / groups, k] -> [groups, in / groups, out / groups, k] -> [groups, out / groups, in / groups, k]
    parts = weight.reshape(groups, inner // groups, outer, -1).transpose(1, 2)
    return parts.flip(3).reshape(groups * outer, inner // groups, *kernel)


def _spread_convolution(
    x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    for place, step in enumerate(stride):
        if step == 1:
            continue
        axis, size = place + 2, x.shape[place + 2]
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        # [..., size, ...] -> [before, size, after] -> [before, size, step * after], the last zeros cut off
        rows = x.reshape(math.prod(before), size, math.prod(after))
        wide = functional.pad(rows, [0, (step - 1) * rows.shape[2]])
        x = wide.reshape(*before, size * step, *after).narrow(axis, 0, (size - 1) * step + 1)
    edges = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
    return PLAIN[weight.dim() - 3](x, weight, padding=edges, dilation=list(dilation), groups=groups)


def convolution_by_depth(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Any:
    """``conv3d`` with groups or holes as a sum over its depth of convolutions of planes; left alone without them.

    ``x`` [N, C, D, H, W].
    """
    stride, dilation = one_an_axis(stride, 3), one_an_axis(dilation, 3)
    if groups == 1 and all(step == 1 for step in dilation):
        return NotImplemented
    pads = one_an_axis(padding, 3)
    padded = functional.pad(x, [0, 0, 0, 0, pads[0], pads[0]])
    count = (padded.shape[2] - dilation[0] * (weight.shape[2] - 1) - 1) // stride[0] + 1
    # [N, C, D, H, W] -> [N, D, C, H, W]
    planes = padded.transpose(1, 2)
    flat = weight.flatten(3)
    total: Any = None
    for place in range(weight.shape[2]):
        first = place * dilation[0]
        seen = planes[:, first : first + (count - 1) * stride[0] + 1 : stride[0]]
        kernel = flat.select(2, place).reshape(*weight.shape[:2], *weight.shape[3:])
        # [N * D, C, H, W], one convolution for all planes
        part = functional.conv2d(
            seen.reshape(-1, *seen.shape[2:]), kernel, None, stride[1:], pads[1:], dilation[1:], groups
        )
        total = part if total is None else total + part
    total = total if bias is None else total + bias.reshape(-1, 1, 1)
    # [N * D, C, H, W] -> [N, C, D, H, W]
    return total.reshape(x.shape[0], count, *total.shape[1:]).transpose(1, 2)
