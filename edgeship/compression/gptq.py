"""GPTQ: round one input channel at a time and let the others make up for it (Frantar et al. 2022, arXiv:2210.17323).

Columns are taken in the order of the Hessian's diagonal (``act_order``), errors are propagated with the Cholesky factor
of the damped inverse Hessian, block by block. Scales are chosen on the grid that artifacts store before any column is
rounded: per channel for the whole row, per group from the group's own float weights ("static groups"), so that ordering
and grouping go together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeship.compression.affine import choose_scales
from edgeship.core.weights import Affine, AffineTensor

if TYPE_CHECKING:
    import torch


@dataclass
class Hessian:
    """``2 X X^T`` over all calibration tokens, accumulated in float32; ``X`` has one column a token.

    Args:
        matrix: ``(K, K)``, K input channels. tokens: how many columns went in.
    """

    matrix: torch.Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, channels: int) -> Hessian:
        """A Hessian that has seen nothing."""
        import torch

        return cls(torch.zeros(channels, channels))

    def add(self, rows: torch.Tensor) -> None:
        """Add tokens, ``(tokens, K)``."""
        rows = rows.reshape(-1, self.matrix.shape[0]).float()
        self.matrix.addmm_(rows.T, rows, alpha=2.0)
        self.tokens += rows.shape[0]


def hessian_of(inputs: Iterable[torch.Tensor], channels: int) -> Hessian:
    """The Hessian of one linear layer's inputs, ``(..., K)`` each."""
    hessian = Hessian.empty(channels)
    for rows in inputs:
        hessian.add(rows)
    return hessian


def quantize_gptq(
    weight: torch.Tensor,
    hessian: Hessian,
    encoding: Affine,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    clip: bool = True,
    block: int = 128,
    name: str = "weight",
) -> AffineTensor:
    """Quantize a ``(N, K)`` weight so that ``||(W - Q) X||`` is small.

    Args:
        hessian: of the layer's inputs. Input channels that were always zero are rounded to nearest.
        damping: share of the mean diagonal that is added to it; raised tenfold while no Cholesky factor exists.
        clip: choose each scale by the weighted squared error of rounding, not by the largest weight alone.
        block: columns whose errors are propagated together.

    Raises:
        EncodingError: the group size does not divide K. WeightsError: not finite.
    """
    import torch

    value = weight.detach().to(torch.float32)
    rows, columns = value.shape
    importance = hessian.matrix.diagonal()
    scale, zero = choose_scales(value, encoding, importance=importance if clip else None, name=name)
    matrix = hessian.matrix.clone()
    dead = matrix.diagonal() == 0
    matrix[dead, dead] = 1.0
    order = torch.argsort(matrix.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    work = value[:, order].clone()
    spread = columns // scale.shape[1]
    column_scale = scale.repeat_interleave(spread, 1)[:, order]
    column_zero = zero.repeat_interleave(spread, 1)[:, order]
    factor = _inverse_factor(matrix[order][:, order], damping)
    integers = torch.empty_like(work)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.empty(rows, end - start)
        for i in range(start, end):
            s, z = column_scale[:, i], column_zero[:, i]
            q = ((work[:, i] / s).round() + z).clamp(encoding.low, encoding.high)
            integers[:, i] = q
            error = (work[:, i] - (q - z) * s) / factor[i, i]
            work[:, i + 1 : end] -= torch.outer(error, factor[i, i + 1 : end])
            errors[:, i - start] = error
        work[:, end:] -= errors @ factor[start:end, end:]
    back = torch.argsort(order)
    dtype = torch.int8 if encoding.symmetric else torch.uint8
    zeros = None if encoding.symmetric else zero.to(dtype).numpy()
    return AffineTensor(integers[:, back].to(dtype).numpy(), scale.numpy(), zeros, encoding)


def _inverse_factor(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the inverse, damped as little as it takes."""
    import torch

    mean = matrix.diagonal().mean()
    while True:
        damped = matrix + torch.eye(matrix.shape[0]) * (damping * mean)
        upper: torch.Tensor
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper
        damping *= 10
