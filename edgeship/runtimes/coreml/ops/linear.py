"""Matrix products; float16 ones are summed in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgeship.runtimes.coreml.ops.registry import Call, computable, op

if TYPE_CHECKING:
    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs


@op("linear")
def linear(call: Call) -> Outputs:
    """``x weight^T + bias``."""
    x, weight = _factors(call, "x", "weight")
    product = torch.matmul(x, weight.transpose(0, 1))
    return product + call.numbers("bias").to(product.dtype) if call.has("bias") else product


@op("matmul")
def matmul(call: Call) -> Outputs:
    """NumPy's matmul, either factor transposed in its last two axes if asked (a vector never is)."""
    x, y = _factors(call, "x", "y")
    if call.flag("transpose_x") and x.dim() > 1:
        x = x.transpose(-1, -2)
    if call.flag("transpose_y") and y.dim() > 1:
        y = y.transpose(-1, -2)
    return torch.matmul(x, y)


@op("einsum")
def einsum(call: Call) -> Outputs:
    """By equation; axes of size 1 broadcast."""
    return torch.einsum(call.text("equation", ""), *[computable(value) for value in call.tensors("values")])


def _factors(call: Call, left: str, right: str) -> tuple[Tensor, Tensor]:
    """The two factors in the type to compute in; shapes as they are."""
    if any(call.tensor(name).dtype.is_floating_point for name in (left, right)):
        return call.floats(left), call.floats(right)
    return call.numbers(left), call.numbers(right)
