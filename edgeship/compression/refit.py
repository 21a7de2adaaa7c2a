"""The kept weights of a pruned layer, moved to where they make up best for those that went.

Least squares on the kept support, all rows at once, by conjugate gradients preconditioned with the Hessian's diagonal
(as ALPS does, Meng et al. 2024, arXiv:2406.07831).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from edgeship.compression.hessian import Hessian

# Ten are within 1 % of the least error on layers with strong correlations; more are for the badly conditioned.
STEPS = 20


def refit_kept(
    weight: torch.Tensor, mask: torch.Tensor, hessian: Hessian, *, damping: float = 0.01, steps: int = STEPS
) -> torch.Tensor:
    """The ``Q`` with ``||(W - Q) X||`` least among those that are zero where ``mask`` is False.

    Args:
        weight: ``(N, K)`` before pruning; a convolution's flattened, its groups one after the other in N.
        mask: bool, same shape, True where a weight is kept. hessian: of the layer's inputs.
        damping: share of the Hessian's mean diagonal added to it; 0 fits the calibration data alone.
        steps: conjugate gradients, each of which costs one matrix product with the Hessian.
    """
    import torch

    groups, columns = hessian.upper.shape[:2]
    value = weight.detach().float().reshape(groups, -1, columns)
    kept = mask.reshape(value.shape)
    matrix = hessian.matrix.reshape(hessian.upper.shape)
    diagonal = hessian.diagonal[:, None]
    ridge = (damping * diagonal.mean(2, keepdim=True)).clamp(min=1e-30)

    def apply(rows: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(rows * ridge, rows, matrix) * kept

    inverse = 1 / (diagonal + ridge)
    found = value * kept
    residual = apply(value - found)
    step = residual * inverse
    size = (residual * step).sum(2, keepdim=True)
    for _ in range(steps):
        pushed = apply(step)
        length = size / (step * pushed).sum(2, keepdim=True).clamp(min=1e-30)
        found += length * step
        residual -= length * pushed
        turned = residual * inverse
        new = (residual * turned).sum(2, keepdim=True)
        step = turned + new / size.clamp(min=1e-30) * step
        size = new
    return found.reshape(weight.shape)
