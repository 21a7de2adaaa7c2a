"""The kept weights of a pruned layer, moved to where they make up best for those that went.

Least squares on the kept support, all rows at once, by conjugate gradients preconditioned with the Hessian's diagonal
(as ALPS does, Meng et al. 2024, arXiv:2406.07831). It solves for one layer at a time and trains nothing.

A Hessian that knows how far the inputs have drifted from the float model's gives weights that aim at the float model's
outputs (as GPTAQ does, Li et al. 2025, arXiv:2504.02692).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from edgeship.compression.hessian import Hessian
    from edgeship.compression.walk import Layer

# Ten are within 1 % of the least error on layers with strong correlations; more are for the badly conditioned.
STEPS = 20
REFITTED_OPS = ("linear", "conv")


def refit_kept(
    weight: torch.Tensor,
    mask: torch.Tensor,
    hessian: Hessian,
    *,
    damping: float = 0.01,
    drift: float = 0.0,
    steps: int = STEPS,
) -> torch.Tensor:
    """The ``Q`` with ``||(W - Q) X||`` least among those that are zero where ``mask`` is False.

    Args:
        weight: ``(N, K)`` before pruning; a convolution's flattened, its groups one after the other in N.
        mask: bool, same shape, True where a weight is kept. hessian: of the layer's inputs.
        damping: share of the Hessian's mean diagonal added to it; 0 fits the calibration data alone.
        drift: share of the inputs' drift from the float model that is taken back, where the Hessian knows it.
        steps: conjugate gradients, each of which costs one matrix product with the Hessian.
    """
    import torch

    groups, columns = hessian.upper.shape[:2]
    # [N, K] -> [groups, N / groups, K]
    value = weight.detach().float().reshape(groups, -1, columns)
    kept = mask.reshape(value.shape)
    matrix = hessian.matrix.reshape(hessian.upper.shape)
    diagonal = hessian.diagonal[:, None]
    ridge = (damping * diagonal.mean(2, keepdim=True)).clamp(min=1e-30)

    def apply(rows: torch.Tensor) -> torch.Tensor:
        """[groups, rows, K]: the damped normal equations of each row, on what it keeps."""
        return torch.baddbmm(rows * ridge, rows, matrix) * kept

    # Preconditioned by the diagonal.
    inverse = 1 / (diagonal + ridge)
    found = value * kept
    # Conjugate gradients on every row at once, [groups, N, K]; what is not kept stays zero.
    residual = apply(value - found)
    if drift and hessian.drift is not None:
        residual += drift * torch.bmm(value, hessian.drift) * kept
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


def hessian_of_layer(layer: Layer) -> Hessian:
    """The Hessian of what a linear layer or a convolution on a walk reads."""
    from edgeship.compression.hessian import hessian_of, hessian_of_conv

    weight = layer.weight
    if layer.use.op == "linear":
        hessian = hessian_of(layer.inputs, weight.shape[1], layer.wanted)
    else:
        # ``aten.conv*d(input, weight, bias, stride, padding, dilation, groups)``
        window = dict(zip(("stride", "padding", "dilation"), layer.node.args[3:6], strict=False))
        hessian = hessian_of_conv(layer.inputs, weight.shape, groups=layer.use.groups, wanted=layer.wanted, **window)  # type: ignore[arg-type]
    hessian.check(layer.use.name)
    return hessian


def refit_layer(layer: Layer, mask: torch.Tensor, hessian: Hessian, *, drift: float = 0.0) -> torch.Tensor:
    """`refit_kept` of a layer on a walk, in the weight's own shape."""
    flat = layer.weight.reshape(layer.weight.shape[0], -1)
    return refit_kept(flat, mask.reshape(flat.shape), hessian, drift=drift).reshape(layer.weight.shape)
