"""What coremltools 9.0's torch.export front end lacks, in one table.

An entry is dropped when coremltools has the operator and its test passes without the entry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
from coremltools.converters.mil.frontend.torch.utils import sanitize_op_kind

from edgeship.lowering.operators import Rewrite, index_copy, new_ones, on_masks, product, rewritten

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

aten = torch.ops.aten

REWRITES: dict[Any, Rewrite] = {
    aten.new_ones.default: new_ones,
    aten.__and__.Tensor: on_masks(torch.logical_and),
    aten.__or__.Tensor: on_masks(torch.logical_or),
    aten.bitwise_and.Tensor: on_masks(torch.logical_and),
    aten.bitwise_or.Tensor: on_masks(torch.logical_or),
    aten.index_copy.default: index_copy,
    aten.prod.dim_int: product,
}


def in_coreml_operators(exported: ExportedProgram) -> ExportedProgram:
    """The program in operators that coremltools converts. Raises `UnsupportedOpError` naming one that it cannot."""
    return rewritten(exported, _known, REWRITES, "Core ML")


def _known(node: Node) -> bool:
    name = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else getattr(node.target, "__name__", "")
    return sanitize_op_kind(name) in _TORCH_OPS_REGISTRY
