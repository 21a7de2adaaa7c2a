"""What coremltools 9.0's torch.export front end lacks, in one table.

An entry is dropped when coremltools has the operator and its test passes without the entry.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from edgeship.compat.coremltools import knows_operator
from edgeship.compat.torch import is_operator
from edgeship.lowering.convolutions import transposed_convolution
from edgeship.lowering.operators import (
    Rewrite,
    index_copy,
    new_ones,
    on_masks,
    product,
    rewritten,
)
from edgeship.program.windows import dilated_maximum

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import Node

aten = torch.ops.aten


def _filled_up(*args: Any, **kwargs: Any) -> Any:
    """Transposed convolutions with output padding: the front end pads what goes in."""
    padding = args[5] if len(args) > 5 else kwargs.get("output_padding", ())
    return transposed_convolution(*args, grouped=True, dilated=True, **kwargs) if any(padding) else NotImplemented


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """An RMS norm in numbers that float16 holds: by the largest of each row, and the epsilon with it.

    A row of zeros is divided by the root of the epsilon, or by `LEAST` where that is smaller, and stays zeros.
    """
    axes = list(range(-len(shape), 0))
    root = math.sqrt(torch.finfo(torch.float32).eps if eps is None else eps)
    largest = torch.maximum(x.abs().amax(axes, keepdim=True), torch.full((), max(root, LEAST), dtype=x.dtype))
    y, small = x / largest, root / largest
    mean = (y * y).mean(axes, keepdim=True) + small * small
    floor = torch.full((), min(LEAST, 1 / (2 * math.prod(shape))), dtype=x.dtype)
    normed = y * torch.rsqrt(torch.maximum(mean, floor))
    return normed if weight is None else normed * weight


def _group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, _: bool = True
) -> Tensor:
    """``group_norm`` as a layer norm of the groups: the front end squares in float16."""
    # [N, C, ...] -> [N, groups, C / groups * ...]
    grouped = x.reshape(x.shape[0], groups, -1)
    found = functional.layer_norm(grouped, grouped.shape[2:], eps=eps).reshape(x.shape)
    shape = (-1, *[1] * (x.dim() - 2))
    found = found if weight is None else found * weight.reshape(shape)
    return found if bias is None else found + bias.reshape(shape)


def _log_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """``log_softmax`` without the logarithm of a probability, which may be 0. Along ``dim``."""
    lower = (x if dtype is None else x.to(dtype)) - x.amax(dim, keepdim=True)
    return lower - torch.log(torch.exp(lower).sum(dim, keepdim=True))


def _reciprocal(x: Tensor) -> Tensor:
    """A quotient: Core ML's ``inverse`` adds 1e-4 to what it divides by unless it is told. Element by element."""
    return torch.div(torch.full((), 1.0, dtype=x.dtype), x)


REWRITES: dict[Any, Rewrite] = {
    aten.reciprocal.default: _reciprocal,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.log_softmax.int: _log_softmax,
    aten.conv_transpose1d.default: _filled_up,
    aten.conv_transpose2d.input: _filled_up,
    aten.conv_transpose3d.input: _filled_up,
    aten.new_ones.default: new_ones,
    aten.__and__.Tensor: on_masks(torch.logical_and),
    aten.__or__.Tensor: on_masks(torch.logical_or),
    aten.bitwise_and.Tensor: on_masks(torch.logical_and),
    aten.bitwise_or.Tensor: on_masks(torch.logical_or),
    aten.index_copy.default: index_copy,
    aten.prod.dim_int: product,
    aten.max_pool1d.default: dilated_maximum,
    aten.max_pool2d.default: dilated_maximum,
    aten.max_pool3d.default: dilated_maximum,
    aten.where.ScalarOther: lambda condition, x, other: torch.where(condition, x, x.new_full((), other)),
}
POOLS = (
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
)
# The smallest number that float16 holds with all its bits.
LEAST = 2.0**-14
# Axes of a batch of images.
IMAGE = 4
# Where the padding stands among the arguments of a pool.
PADDING = 3


def in_coreml_operators(exported: ExportedProgram) -> ExportedProgram:
    """The program in operators that coremltools converts. Raises `UnsupportedOpError` naming one that it cannot."""
    program = rewritten(exported, _known, REWRITES, "Core ML")
    _spell_out_pools(program)
    _spell_out_prelus(program)
    return program


def _spell_out_pools(exported: ExportedProgram) -> None:
    """Write out the stride and padding that a pool leaves to torch: the front end wants to be told."""
    for node in exported.graph.nodes:
        if node.target not in POOLS or len(node.args) > PADDING:
            continue
        kernel = node.args[1]
        stride = node.args[2] if len(node.args) > 2 and node.args[2] else kernel
        node.args = (node.args[0], kernel, stride, [0] * len(kernel))
    exported.graph_module.recompile()


def _spell_out_prelus(exported: ExportedProgram) -> None:
    """Write a leaky ReLU with learned slopes in plain operators where Core ML's own does not take it: it wants slopes
    that are constants, one for all, or one a channel of an image."""
    user_inputs = set(exported.graph_signature.user_inputs)
    for node in list(exported.graph.nodes):
        if node.target != aten.prelu.default:
            continue
        x, slope = node.args[0].meta["val"], node.args[1]
        constant = slope.op in ("placeholder", "get_attr") and slope.name not in user_inputs
        if constant and (x.dim() == IMAGE or (slope.meta["val"].numel() == 1 and x.dim() in (1, 2, 3, 5))):
            continue
        # One slope a channel, and channels lie along the second axis.
        shape = [-1, *[1] * (x.dim() - 2)] if slope.meta["val"].numel() > 1 else [1] * x.dim()
        with exported.graph.inserting_before(node):
            spread = _computed(exported, aten.reshape.default, slope, shape)
            below = _computed(exported, aten.mul.Tensor, node.args[0], spread)
            positive = _computed(exported, aten.gt.Scalar, node.args[0], 0)
            found = _computed(exported, aten.where.self, positive, node.args[0], below)
        # [C] -> [C, 1, ..], beside x of [N, C, ..]
        node.replace_all_uses_with(found)
        exported.graph.erase_node(node)
        found.name = node.name
    exported.graph_module.recompile()


def _computed(exported: ExportedProgram, target: Any, *args: Any) -> Node:
    """A new operator, with the shape and dtype of what it computes."""
    node: Node = exported.graph.call_function(target, args)
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, torch.fx.Node) else arg for arg in args))
    return node


def _known(node: Node) -> bool:
    name = str(node.target) if is_operator(node.target) else getattr(node.target, "__name__", "")
    return knows_operator(name)
