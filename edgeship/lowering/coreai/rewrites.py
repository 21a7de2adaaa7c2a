"""What coreai-torch 0.4.3 lacks, or lowers to something else, in one table.

An entry is dropped when coreai-torch has the operator and its test passes without the entry.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from coreai_torch import get_decomp_table

from edgeship.compat.coreai import knows_aten
from edgeship.compat.torch import is_operator
from edgeship.lowering.convolutions import transposed_convolution
from edgeship.lowering.operators import (
    Rewrite,
    index_copy,
    index_put,
    linear,
    new_ones,
    ordered,
    remainder,
    rewritten,
    scatter_add,
    variance,
)
from edgeship.program.windows import average_pool

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

aten = torch.ops.aten

REWRITES: dict[Any, Rewrite] = {
    # Lowered as if ceil_mode were off and padding counted, silently.
    aten.avg_pool2d.default: average_pool,
    aten.avg_pool3d.default: average_pool,
    aten.conv_transpose3d.input: functools.partial(transposed_convolution, spread=True),
    aten.index_copy.default: index_copy,
    aten.index_put.default: index_put,
    aten.linear.default: linear,
    aten.new_ones.default: new_ones,
    aten.remainder.Scalar: remainder,
    aten.scatter_add.default: scatter_add,
    aten.sort.default: ordered,
    aten.var.correction: variance,
}


def in_coreai_operators(exported: ExportedProgram) -> ExportedProgram:
    """The program in operators that Core AI's converter has. Raises `UnsupportedOpError` naming one that it has not."""
    return rewritten(exported, _known, REWRITES, "Core AI", get_decomp_table())


def _known(node: Node) -> bool:
    if not is_operator(node.target):
        return True
    namespace, _, key = str(node.target).partition(".")
    # The converter is told about these by us.
    return namespace in ("quantized_decomposed", "edgeship") or (namespace == "aten" and knows_aten(key))
