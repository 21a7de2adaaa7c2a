"""What ONNX has, and ONNX Runtime computes otherwise than torch, written in operators that it computes alike.

Its GroupNormalization and LayerNormalization take the variance for the mean of squares less the square of the mean,
which is noise on a large mean; its dilated ConvTranspose refuses some shapes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from edgeship.compat.torch import decomposed
from edgeship.lowering.convolutions import transposed_convolution

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

aten = torch.ops.aten


def in_onnx_operators(exported: ExportedProgram) -> ExportedProgram:
    """The program with those operators rewritten; itself where it has none of them."""
    if not any(node.target in REWRITES for node in exported.graph.nodes):
        return exported
    return decomposed(exported, REWRITES)


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, _: bool = True
) -> Tensor:
    """``group_norm`` as an instance norm of the groups, which is computed around the mean."""
    # [N, C, ...] -> [N, groups, C / groups * ...]
    grouped = x.reshape(x.shape[0], groups, -1)
    found = functional.instance_norm(grouped, eps=eps).reshape(x.shape)
    shape = (-1, *[1] * (x.dim() - 2))
    found = found if weight is None else found * weight.reshape(shape)
    return found if bias is None else found + bias.reshape(shape)


def _dilated(*args: Any, **kwargs: Any) -> Any:
    dilation = args[7] if len(args) > 7 else kwargs.get("dilation", (1,))
    if all(step == 1 for step in dilation):
        return NotImplemented
    return transposed_convolution(*args, grouped=True, **kwargs)


REWRITES: dict[Any, Any] = {
    aten.conv_transpose1d.default: _dilated,
    aten.conv_transpose2d.input: _dilated,
    aten.group_norm.default: group_norm,
}
