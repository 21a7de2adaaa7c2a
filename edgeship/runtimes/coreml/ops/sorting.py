"""Order along an axis. Equal elements keep their order; Core ML promises none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from edgeship.runtimes.coreml.ops.registry import Outputs


@op("argsort")
def argsort(call: Call) -> Outputs:
    """Indices that sort ``x``, largest first unless ``ascending``."""
    x = call.numbers("x")
    axis = call.axis("axis", -1, x.dim())
    return torch.sort(x, dim=axis, descending=not call.flag("ascending"), stable=True).indices


@op("topk")
def topk(call: Call) -> Outputs:
    """The ``k`` largest (or smallest) elements and, unless declined, their indices; -1 is all of them."""
    x = call.numbers("x")
    axis = call.axis("axis", -1, x.dim())
    k = call.integer("k", 1)
    values, indices = torch.sort(x, dim=axis, descending=not call.flag("ascending"), stable=True)
    k = x.shape[axis] if k == -1 else k
    values, indices = values.narrow(axis, 0, k), indices.narrow(axis, 0, k)
    return (values, indices) if call.flag("return_indices", True) else values
