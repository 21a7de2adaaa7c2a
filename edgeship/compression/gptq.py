"""GPTQ: round one input channel at a time and let the others make up for it (Frantar et al. 2022, arXiv:2210.17323).

With the Cholesky factor ``H = U^T U`` the squared error of the outputs is ``||U E||^2``, one term a row of ``U``;
taking channels from the last to the first, each is rounded so that its own term is smallest given the errors before.
These are GPTQ's own numbers without an inverse (Chen et al. 2025, arXiv:2507.18553): one factorization and one pass of
matrix products. Channels go in the order of the Hessian's diagonal (``act_order``), the costliest first. Weights that
pruning took stay zero and the others make up for them too, as in SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774),
but all of them at once, before rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, overload

from edgeship.compression.affine import choose_scales
from edgeship.compression.hessian import Hessian, hessian_of, hessian_of_conv
from edgeship.compression.palette import choose_table, nearest_entry
from edgeship.compression.refit import refit_kept
from edgeship.core.weights import Affine, AffineTensor, Palette, PaletteTensor
from edgeship.errors import EncodingError, WeightsError

if TYPE_CHECKING:
    import torch

__all__ = ["Hessian", "hessian_of", "hessian_of_conv", "quantize_gptq", "quantize_gptq_conv"]


@overload
def quantize_gptq(
    weight: torch.Tensor,
    hessian: Hessian,
    encoding: Affine,
    *,
    mask: torch.Tensor | None = None,
    damping: float = 0.01,
    act_order: bool = True,
    clip: bool = True,
    block: int = 128,
    name: str = "weight",
) -> AffineTensor: ...


@overload
def quantize_gptq(
    weight: torch.Tensor,
    hessian: Hessian,
    encoding: Palette,
    *,
    mask: torch.Tensor | None = None,
    damping: float = 0.01,
    act_order: bool = True,
    clip: bool = True,
    block: int = 128,
    name: str = "weight",
) -> PaletteTensor: ...


def quantize_gptq(
    weight: torch.Tensor,
    hessian: Hessian,
    encoding: Affine | Palette,
    *,
    mask: torch.Tensor | None = None,
    damping: float = 0.01,
    act_order: bool = True,
    clip: bool = True,
    block: int = 128,
    name: str = "weight",
) -> AffineTensor | PaletteTensor:
    """Quantize a weight so that ``||(W - Q) X||`` is small.

    Args:
        weight: ``(N, K)``; a convolution's with its kernel flattened into K, and its groups one after the other in N.
        hessian: of the layer's inputs, with as many groups as the convolution. Input channels that were always zero
            are rounded to nearest.
        mask: bool, the weight's shape, True where a weight is kept. The others become zero (the zero point, or index 0
            of a palette), which the kept ones make up for: give the weight as it was before pruning.
        damping: share of the mean diagonal that is added to it; raised tenfold while no Cholesky factor exists.
        clip: choose each scale by the weighted squared error of rounding, not by the largest weight alone.
        block: channels whose errors are propagated together.

    Raises:
        EncodingError: the group size does not divide K. WeightsError: not finite. DataError: inputs that were not.
    """
    import torch

    value = weight.detach().to(torch.float32)
    if not bool(torch.isfinite(value).all()):
        raise WeightsError(f"{name} holds NaN or infinity", fix="train or export the model again")
    hessian.check(name)
    groups, columns = hessian.upper.shape[:2]
    if value.dim() != 2 or value.shape[1] != columns or value.shape[0] % groups:
        raise EncodingError(f"a Hessian of {groups} x {columns} channels does not fit {name} {tuple(value.shape)}")
    rows = value.shape[0] // groups
    kept = None if mask is None else mask.to(torch.bool)
    if kept is not None:
        value = refit_kept(value, kept, hessian, damping=damping)
    importance = hessian.diagonal.repeat_interleave(rows, 0)
    grid: _AffineGrid | _PaletteGrid
    if isinstance(encoding, Palette):
        cost = importance.expand_as(value) if kept is None else importance * kept
        grid = _PaletteGrid(value, cost if clip else None, encoding, groups, name)
    else:
        grid = _AffineGrid(value, importance if clip else None, encoding, groups, name)
    order = torch.argsort(hessian.diagonal.sum(0), stable=True) if act_order else torch.arange(columns).flip(0)
    factor = _factor(hessian, order, damping)
    # Channels first: each step then reads and writes memory that lies together.
    target = value.reshape(groups, rows, columns)[:, :, order].mT.contiguous()
    keep = None if kept is None else kept.reshape(groups, rows, columns)[:, :, order].mT.contiguous()
    integers = _round_columns(target, factor, grid, order.tolist(), keep, block)
    back = torch.empty_like(order)
    back[order] = torch.arange(columns)
    return grid.pack(integers[:, back].mT.reshape(groups * rows, columns))


def quantize_gptq_conv(
    weight: torch.Tensor,
    inputs: Iterable[torch.Tensor],
    encoding: Affine | Palette,
    *,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
    mask: torch.Tensor | None = None,
    hessian: Hessian | None = None,
    damping: float = 0.01,
    act_order: bool = True,
    clip: bool = True,
    name: str = "weight",
) -> AffineTensor | PaletteTensor:
    """`quantize_gptq` for a convolution ``(O, I / groups, *kernel)`` of 1, 2 or 3 dimensions, depthwise too.

    Args:
        inputs: ``(B, I, *space)`` each. stride, padding, dilation: one a dimension, or one for all.
        hessian: what `hessian_of_conv` made of the inputs already; they are not read then.

    Raises:
        EncodingError: scales in groups, which convolutions do not have. Else as `quantize_gptq`.
    """
    if isinstance(encoding, Affine) and encoding.granularity == "group":
        raise EncodingError(
            f"{name} is a convolution and has no groups of input channels", fix="use one scale a channel"
        )
    if hessian is None:
        hessian = hessian_of_conv(inputs, weight.shape, stride, padding, dilation, groups)
    flat = weight.detach().reshape(weight.shape[0], -1)
    made = quantize_gptq(
        flat,
        hessian,
        encoding,  # type: ignore[arg-type]
        mask=None if mask is None else mask.reshape(flat.shape),
        damping=damping,
        act_order=act_order,
        clip=clip,
        name=name,
    )
    shape = tuple(weight.shape)
    if isinstance(made, PaletteTensor):
        return PaletteTensor(made.indices.reshape(shape), made.table, made.encoding)
    ones = (1,) * (len(shape) - 1)
    zero = None if made.zero_point is None else made.zero_point.reshape(-1, *ones)
    return AffineTensor(made.values.reshape(shape), made.scale.reshape(-1, *ones), zero, made.encoding)


class _AffineGrid:
    """Scales chosen before anything is rounded ("static groups"), so that ordering and grouping go together."""

    def __init__(
        self, value: torch.Tensor, importance: torch.Tensor | None, encoding: Affine, groups: int, name: str
    ) -> None:
        self.encoding = encoding
        self.scale, self.zero = choose_scales(value, encoding, importance=importance, name=name)
        self._reach = value.shape[1] // self.scale.shape[1]
        # (blocks along K, groups, rows)
        shape = (groups, value.shape[0] // groups, self.scale.shape[1])
        self._scales = self.scale.expand(value.shape[0], -1).reshape(shape).permute(2, 0, 1).contiguous()
        self._zeros = self.zero.expand(value.shape[0], -1).reshape(shape).permute(2, 0, 1).contiguous()

    def round(self, wanted: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The integers nearest to one channel's weights, and what they stand for."""
        scale, zero = self._scales[column // self._reach], self._zeros[column // self._reach]
        integers = (wanted / scale).round_().add_(zero).clamp_(self.encoding.low, self.encoding.high)
        return integers, (integers - zero).mul_(scale)

    def nothing(self, column: int) -> torch.Tensor:
        """The integers that stand for zero."""
        return self._zeros[column // self._reach]

    def pack(self, integers: torch.Tensor) -> AffineTensor:
        """The tensor as it will be stored."""
        import torch

        dtype = torch.int8 if self.encoding.symmetric else torch.uint8
        zeros = None if self.encoding.symmetric else self.zero.to(dtype).numpy()
        return AffineTensor(integers.to(dtype).numpy(), self.scale.numpy(), zeros, self.encoding)


class _PaletteGrid:
    """Tables clustered with what an error in each weight costs, before anything is rounded."""

    def __init__(
        self, value: torch.Tensor, cost: torch.Tensor | None, encoding: Palette, groups: int, name: str
    ) -> None:
        self.encoding = encoding
        self.table = choose_table(value, encoding, importance=cost, name=name)
        # One table a row of the weight, in (groups * rows) order.
        self._tables = self.table.repeat_interleave(value.shape[0] // self.table.shape[0], 0)

    def round(self, wanted: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The indices of the entries nearest to one channel's weights, and those entries."""
        indices = nearest_entry(wanted.reshape(-1, 1), self._tables)
        return indices.reshape(wanted.shape).float(), self._tables.gather(1, indices).reshape(wanted.shape)

    def nothing(self, column: int) -> float:
        """The index at weights that are not stored."""
        return 0.0

    def pack(self, integers: torch.Tensor) -> PaletteTensor:
        """The tensor as it will be stored."""
        import torch

        return PaletteTensor(integers.to(torch.uint8).numpy(), self.table.numpy(), self.encoding)


def _round_columns(
    target: torch.Tensor,
    factor: torch.Tensor,
    grid: _AffineGrid | _PaletteGrid,
    order: list[int],
    keep: torch.Tensor | None,
    block: int,
) -> torch.Tensor:
    """Integers, ``(groups, K, rows)``, of weights in that layout, from the last channel to the first."""
    import torch

    columns = target.shape[1]
    errors = torch.empty_like(target)
    integers = torch.empty(target.shape, dtype=torch.int16)
    pivots = factor.diagonal(dim1=1, dim2=2)
    for end in range(columns, 0, -block):
        start = max(0, end - block)
        pushed = torch.bmm(factor[:, start:end, end:], errors[:, end:])
        for i in range(end - 1, start - 1, -1):
            push = pushed[:, i - start]
            if i + 1 < end:
                push += torch.bmm(factor[:, i : i + 1, i + 1 : end], errors[:, i + 1 : end])[:, 0]
            found, values = grid.round(target[:, i] + push / pivots[:, i, None], order[i])
            if keep is not None:
                found, values = torch.where(keep[:, i], found, grid.nothing(order[i])), values * keep[:, i]
            integers[:, i] = found
            torch.sub(target[:, i], values, out=errors[:, i])
    return integers


def _factor(hessian: Hessian, order: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the Hessian in the given order, damped as little as it takes."""
    import torch

    matrix = hessian.matrix.reshape(hessian.upper.shape)[:, order][:, :, order]
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    # A channel that nothing reaches is on its own; its number only has to be positive.
    diagonal[diagonal == 0] = 1.0
    added = 0.0
    while True:
        diagonal += mean.clamp(min=1e-30) * (damping - added)
        added = damping
        upper: torch.Tensor
        upper, failed = torch.linalg.cholesky_ex(matrix, upper=True)
        if not bool(failed.any()) and bool(torch.isfinite(upper).all()):
            return upper
        damping = max(damping * 10, 1e-6)
