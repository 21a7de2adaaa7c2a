"""Hessians of layers: what an error in a weight costs at the layer's outputs, gathered in bounded memory.

For a linear layer with inputs ``x`` the squared error of the outputs is ``E H E^T / 2`` with ``H = 2 X X^T`` (Frantar
et al. 2022, arXiv:2210.17323). A convolution is a linear layer on patches, one for each of its groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeship.compression.products import product
from edgeship.errors import DataError

if TYPE_CHECKING:
    import torch

# Columns of a Hessian computed at once: only blocks on and above the diagonal are, nearly half of the products.
TRIANGLE = 512
# Tokens that are added at once, so that products and not memory take the time.
TOKENS = 1024
# Patches are unfolded this many numbers at a time (64 MB).
PATCH_NUMBERS = 1 << 24


@dataclass(frozen=True)
class Factored:
    """The Cholesky factor of a damped Hessian, ``(groups, K, K)``, with its channels in ``order``."""

    order: torch.Tensor
    damping: float
    upper: torch.Tensor


@dataclass
class Hessian:
    """``2 X X^T`` over all calibration tokens, accumulated in float32; ``X`` has one column a token.

    Args:
        upper: ``(groups, K, K)``, K input channels; blocks below the diagonal are not kept up. tokens: columns seen.
        drift: ``2 (X' - X) X^T``, where ``X'`` is what the float model has in the same place; None when not asked for.
        factored: the last factor made of it: layers with the same inputs, and parts of a layer, share it.
    """

    upper: torch.Tensor
    tokens: int = 0
    drift: torch.Tensor | None = None
    factored: Factored | None = None

    @classmethod
    def empty(cls, channels: int, groups: int = 1) -> Hessian:
        """A Hessian that has seen nothing."""
        import torch

        return cls(torch.zeros(groups, channels, channels))

    @property
    def channels(self) -> int:
        """Input channels, K."""
        return int(self.upper.shape[-1])

    @property
    def matrix(self) -> torch.Tensor:
        """The whole ``(K, K)`` matrix; ``(groups, K, K)`` when there are several."""
        self.mirror()
        return self.upper[0] if self.upper.shape[0] == 1 else self.upper

    def mirror(self) -> None:
        """Copy what is above the diagonal to where it is not kept up."""
        for start in range(0, self.channels, TRIANGLE):
            end = start + TRIANGLE
            self.upper[:, end:, start:end] = self.upper[:, start:end, end:].mT

    @property
    def diagonal(self) -> torch.Tensor:
        """``(groups, K)``: twice the sum of squares of each input channel."""
        return self.upper.diagonal(dim1=1, dim2=2)

    def add(self, rows: torch.Tensor, wanted: torch.Tensor | None = None) -> None:
        """Add tokens: ``(..., K)``, or ``(groups, tokens, K)`` when there are several groups.

        ``wanted`` is what the float model has in their place, in the same shape.
        """
        import torch

        groups, channels = self.upper.shape[:2]
        rows = rows.detach().reshape(groups, -1, channels).float()
        apart = None
        if wanted is not None:
            apart = wanted.detach().reshape(rows.shape).float() - rows
            if self.drift is None:
                self.drift = torch.zeros_like(self.upper)
        self.tokens += rows.shape[1]
        self.factored = None
        if groups == 1:
            self._add_lines(rows[0].T.contiguous(), None if apart is None else apart[0].T.contiguous())
            return
        if apart is not None and self.drift is not None:
            self.drift.baddbmm_(apart.mT, rows, alpha=2.0)
        for start in range(0, channels, TRIANGLE):
            end = start + TRIANGLE
            # (groups, block, tokens) times (groups, tokens, what is right of the block's left edge)
            self.upper[:, start:end, start:].baddbmm_(rows[:, :, start:end].mT, rows[:, :, start:], alpha=2.0)

    def _add_lines(self, lines: torch.Tensor, apart: torch.Tensor | None) -> None:
        """`add` for one group, as ``(K, tokens)``: a line a channel."""
        for start in range(0, self.channels, TRIANGLE):
            end = start + TRIANGLE
            # (block, tokens) times (tokens, what is right of the block's left edge)
            self.upper[0, start:end, start:].add_(product(lines[start:end], lines[start:]), alpha=2.0)
            if apart is not None and self.drift is not None:
                self.drift[0, start:end].add_(product(apart[start:end], lines), alpha=2.0)

    def check(self, name: str = "layer") -> None:
        """Raise `DataError` when the inputs were not finite, too large to square, or never came."""
        import torch

        if self.tokens == 0:
            raise DataError(f"{name} saw no calibration data", fix="give at least one sample")
        if not bool(torch.isfinite(self.diagonal).all()):
            raise DataError(
                f"inputs of {name} hold NaN, infinity or values beyond 1e18 on the calibration data",
                fix="remove the samples that cause them",
            )


def hessian_of(inputs: Iterable[torch.Tensor], channels: int, wanted: Iterable[torch.Tensor] | None = None) -> Hessian:
    """The Hessian of one linear layer's inputs, ``(..., K)`` each; ``wanted`` are those of the float model.

    [..., K] -> [1, K, K].
    """
    hessian = Hessian.empty(channels)
    for rows, right in _joined(_pairs(inputs, wanted), channels):
        hessian.add(rows, right)
    return hessian


def _joined(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor | None]], channels: int
) -> Iterable[tuple[torch.Tensor, torch.Tensor | None]]:
    """Short batches put together, so that the matrix is read and written once for many tokens."""
    import torch

    waiting: list[torch.Tensor] = []
    waiting_right: list[torch.Tensor] = []
    tokens = 0

    def together() -> tuple[torch.Tensor, torch.Tensor | None]:
        """[tokens, K] each."""
        return torch.cat(waiting), torch.cat(waiting_right) if waiting_right else None

    for rows, right in pairs:
        # [..., channels] -> [tokens, channels]
        flat = rows.detach().reshape(-1, channels)
        waiting.append(flat)
        if right is not None:
            waiting_right.append(right.detach().reshape(-1, channels))
        tokens += flat.shape[0]
        if tokens >= TOKENS:
            yield together()
            waiting, waiting_right, tokens = [], [], 0
    if waiting:
        yield together()


def hessian_of_conv(
    inputs: Iterable[torch.Tensor],
    weight_shape: Sequence[int],
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
    wanted: Iterable[torch.Tensor] | None = None,
) -> Hessian:
    """The Hessians of a convolution's patches, one a group: ``(groups, K, K)`` with ``K = I / groups * kernel``.

    Args:
        inputs: ``(B, I, *space)`` each, or ``(I, *space)``; 1, 2 or 3 dimensions of space.
        weight_shape: ``(O, I / groups, *kernel)``. stride, padding, dilation: one a dimension, or one for all.
        wanted: the same of the float model.
    """
    kernel = [int(size) for size in weight_shape[2:]]
    width = int(weight_shape[1])
    for size in kernel:
        width *= size
    hessian = Hessian.empty(width, groups)
    for pair in _pairs(inputs, wanted):
        # Both are cut alike, so their patches come in step.
        cut = (_patches(image, kernel, stride, padding, dilation, groups) for image in pair if image is not None)
        for patches in zip(*cut, strict=True):
            hessian.add(*patches)
    return hessian


def _pairs(
    inputs: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor] | None
) -> Iterable[tuple[torch.Tensor, torch.Tensor | None]]:
    """Each batch, [..., K], beside the float model's where that is wanted."""
    return ((rows, None) for rows in inputs) if wanted is None else zip(inputs, wanted, strict=True)


def _patches(
    image: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Iterable[torch.Tensor]:
    """``(groups, tokens, K)`` at a time: some samples, or some rows of one, of at most `PATCH_NUMBERS` numbers."""
    import torch

    space = len(kernel)
    image = image if image.dim() == space + 2 else image.unsqueeze(0)
    stride, padding, dilation = (_each(numbers, space) for numbers in (stride, padding, dilation))
    # torch pads the last axis first.
    sides = [side for size in reversed(padding) for side in (size, size)]
    windows = torch.nn.functional.pad(image.detach().float(), sides)
    for axis in range(space):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        # [..., size, ...] -> [..., positions, ..., reach], of which every dilation-th number counts
        windows = windows.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
    # A view: (B, I, *positions, *kernel), cut where its copy would be too large.
    numbers = windows[:1, :, :1].numel()
    lines = max(1, PATCH_NUMBERS // numbers)
    samples = max(1, lines // windows.shape[2])
    for first in range(0, windows.shape[0], samples):
        for line in range(0, windows.shape[2], lines):
            part = windows[first : first + samples, :, line : line + lines]
            # [B, I, ...] -> [B, groups, I / groups, ...]
            part = part.reshape(part.shape[0], groups, -1, *part.shape[2:])
            # (B, groups, I / groups, *positions, *kernel): groups, tokens, what one weight row sees
            part = part.movedim(2, 2 + space).transpose(0, 1)
            # [groups, B, ...positions, I / groups, ...kernel] -> [groups, tokens, K]
            yield part.flatten(2 + space).flatten(1, 1 + space)


def _each(numbers: Sequence[int], space: int) -> list[int]:
    values = [int(number) for number in numbers]
    return values * space if len(values) == 1 else values
