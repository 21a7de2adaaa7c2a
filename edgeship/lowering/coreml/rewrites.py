"""What coremltools 9.0's torch.export front end lacks, in one table.

An entry is dropped when coremltools has the operator and its test passes without the entry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
from coremltools.converters.mil.frontend.torch.utils import sanitize_op_kind

from edgeship.lowering.operators import (
    Rewrite,
    index_copy,
    new_ones,
    on_masks,
    product,
    rewritten,
    transposed_convolution,
)

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

aten = torch.ops.aten


def _filled_up(*args: Any, **kwargs: Any) -> Any:
    """Transposed convolutions with output padding: the front end pads what goes in."""
    padding = args[5] if len(args) > 5 else kwargs.get("output_padding", ())
    return transposed_convolution(*args, grouped=True, dilated=True, **kwargs) if any(padding) else NotImplemented


REWRITES: dict[Any, Rewrite] = {
    aten.conv_transpose1d.default: _filled_up,
    aten.conv_transpose2d.input: _filled_up,
    aten.new_ones.default: new_ones,
    aten.__and__.Tensor: on_masks(torch.logical_and),
    aten.__or__.Tensor: on_masks(torch.logical_or),
    aten.bitwise_and.Tensor: on_masks(torch.logical_and),
    aten.bitwise_or.Tensor: on_masks(torch.logical_or),
    aten.index_copy.default: index_copy,
    aten.prod.dim_int: product,
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
# Where the padding stands among the arguments of a pool.
PADDING = 3


def in_coreml_operators(exported: ExportedProgram) -> ExportedProgram:
    """The program in operators that coremltools converts. Raises `UnsupportedOpError` naming one that it cannot."""
    program = rewritten(exported, _known, REWRITES, "Core ML")
    _spell_out_pools(program)
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


def _known(node: Node) -> bool:
    name = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else getattr(node.target, "__name__", "")
    return sanitize_op_kind(name) in _TORCH_OPS_REGISTRY
