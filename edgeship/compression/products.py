"""Products of float32 matrices by the fastest kernel that this build of torch has.

Calibration is mostly products. torch takes them through the BLAS it was built with, whose AVX-512 kernels are for one
maker's processors; oneDNN's, which torch carries too, run on all: 2.2 times as fast on Zen 5, and as fast elsewhere.
Which one is used follows from the build of torch alone, so that a machine makes the same bits every time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch


@lru_cache(maxsize=1)
def _onednn() -> Any | None:
    """The product by oneDNN of two strided matrices, where torch has it."""
    from edgeship.compat.torch import onednn_linear

    return onednn_linear()


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right.T``: ``(M, K)`` and ``(N, K)``, both contiguous float32, give ``(M, N)``."""
    call = _onednn()
    if call is None or not left.numel() or not right.numel():
        return left @ right.T
    return cast("torch.Tensor", call(left, right, None, "none", [], ""))


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.nn.functional.linear``, through `product` where all is float32 and dense.

    ``inputs`` [..., K], ``weight`` [N, K], ``bias`` [N] -> [..., N].
    """
    import torch

    given = [inputs, weight] if bias is None else [inputs, weight, bias]
    plain = all(item.dtype == torch.float32 and item.layout == torch.strided for item in given)
    if not plain or weight.dim() != 2 or inputs.dim() < 2:
        return torch.nn.functional.linear(inputs, weight, bias)
    found = product(inputs.reshape(-1, inputs.shape[-1]).contiguous(), weight.contiguous())
    found = found if bias is None else found.add_(bias)
    return found.reshape(*inputs.shape[:-1], weight.shape[0])
