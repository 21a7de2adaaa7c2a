"""Which weights become zero: by magnitude (Han et al. 2015, arXiv:1506.02626) or by Wanda (Sun et al. 2023,
arXiv:2306.11695), unstructured or 2:4."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from edgeship.errors import EncodingError, UsageError

if TYPE_CHECKING:
    import torch

Pattern = Literal["unstructured", "2:4"]


def magnitude_score(weight: torch.Tensor) -> torch.Tensor:
    """``|W|``, in the weight's shape."""
    return weight.detach().float().abs()


def wanda_score(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """``|W| * ||X||``: each weight times the norm of its input channel over all calibration tokens.

    Args:
        weight: ``(N, K)``. norms: ``(K,)``, the L2 norm of each input channel.
    """
    return weight.detach().float().abs() * norms


def keep_mask(
    score: torch.Tensor, sparsity: float, *, pattern: Pattern = "unstructured", per_row: bool = False
) -> torch.Tensor:
    """True where a weight is kept: all but the ``sparsity`` share with the lowest scores.

    Args:
        per_row: compare within each output channel (Wanda's own choice) instead of over the whole tensor. Where the
            share of a row is no whole number, some rows lose one more than others, so that the whole comes out right.
        pattern: ``2:4`` keeps the two best of every four consecutive input channels, whatever ``sparsity`` says.

    Ties go to the earlier weight, so that exactly the share asked for is removed.

    Raises:
        UsageError: a share outside 0..1. EncodingError: 2:4 on input channels that four does not divide.
    """
    import torch

    if not 0 <= sparsity < 1:
        raise UsageError(f"a sparsity of {sparsity} leaves nothing", fix="give a share from 0 up to, not including, 1")
    # Input channels last: the kernel of a convolution must not stand between them.
    moved = score.movedim(1, -1) if pattern == "2:4" and score.dim() > 2 else score
    rows = moved.reshape(-1, moved.shape[-1]) if pattern == "2:4" else score.reshape(score.shape[0], -1)
    if pattern == "2:4":
        if rows.shape[1] % 4:
            raise EncodingError(f"2:4 needs input channels in fours, not {rows.shape[1]}", fix="use unstructured")
        rows = rows.reshape(-1, 4)
        counts = torch.full((rows.shape[0],), 2)
    else:
        rows = rows if per_row else rows.reshape(1, -1)
        # Rounded along the rows: a share of 3 inputs is not a whole number in any of them.
        ends = [round(sparsity * (rows.shape[1] * row)) for row in range(rows.shape[0] + 1)]
        counts = torch.tensor(ends).diff()
    # Sorting from the end makes the later of two equal scores go first.
    order = rows.shape[1] - 1 - rows.flip(1).sort(dim=1, stable=True).indices
    kept = torch.arange(rows.shape[1]) >= counts[:, None]
    mask = torch.empty_like(kept).scatter_(1, order, kept)
    mask = mask.reshape(moved.shape)
    return mask if moved is score else mask.movedim(-1, 1)
