"""GPTQ: round one input channel at a time and let the others make up for it (Frantar et al. 2022, arXiv:2210.17323).

Channels go in the order of the Hessian's diagonal (``act_order``), the costliest first; where groups have scales, group
after group, so that a group's range can be chosen from what its weights are by then, and by what it leaves behind. The
rounding itself is in `nearest_plane`. Weights that pruning took stay zero and the others make up for them too, as in
SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774), but all of them at once, before rounding (`refit`).

A Hessian that knows how far the inputs have drifted from the float model's gives weights that aim at the float model's
outputs (GPTAQ, Li et al. 2025, arXiv:2504.02692): the least squares solution is ``W + W D H^-1``, rounded as any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, overload

from edgeship.compression.affine import choose_scales, spread
from edgeship.compression.hessian import Hessian, hessian_of, hessian_of_conv
from edgeship.compression.nearest_plane import descend, descend_in_groups, descend_in_rows, factor, round_on
from edgeship.compression.palette import choose_table, nearest_entry
from edgeship.compression.refit import refit_kept
from edgeship.core.weights import Affine, AffineTensor, Palette, PaletteTensor
from edgeship.errors import EncodingError, WeightsError

if TYPE_CHECKING:
    import torch

    from edgeship.compression.nearest_plane import Round

# Share of the drift that is taken back: all of it fits the calibration data too closely.
DRIFT = 0.5

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
        clip: choose each range by the error that it leaves at the outputs, not by the largest weight alone.

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
    order, blocks = _order(hessian, encoding, act_order, name)
    upper = factor(hessian, order, damping)
    # Place in the weight -> place in the order.
    back = torch.empty_like(order)
    back[order] = torch.arange(columns)

    def in_place(values: torch.Tensor) -> torch.Tensor:
        """[groups, columns, rows] in the order of rounding -> [groups * rows, columns] in the weight's own."""
        return values[:, back].mT.reshape(groups * rows, columns)

    if hessian.drift is not None:
        # [groups, rows, K] x [groups, K, K], then columns in the order of rounding: [groups, K, rows]
        missed = torch.bmm(value.reshape(groups, rows, columns), hessian.drift)[:, :, order].mT
        value = value + DRIFT * in_place(torch.cholesky_solve(missed, upper, upper=True))
    if kept is not None:
        value = refit_kept(value, kept, hessian, damping=damping)
    # [groups * rows, K] -> [groups, K, rows]
    target = value.reshape(groups, rows, columns)[:, :, order].mT.contiguous()
    keep = None if kept is None else kept.reshape(groups, rows, columns)[:, :, order].mT.contiguous()
    # [groups, K] -> [groups * rows, K]
    importance = hessian.diagonal.repeat_interleave(rows, 0)
    if isinstance(encoding, Palette):
        table = choose_table(value, encoding, importance=importance if clip else None, name=name)
        indices = in_place(descend(target, upper, _entries(table, value.shape[0]), keep)[0])
        indices = indices if kept is None else indices * kept
        return PaletteTensor(indices.to(torch.uint8).numpy(), table.numpy(), encoding)
    if clip and encoding.granularity == "group":
        integers, scale, zero = descend_in_groups(target, upper, encoding, blocks, keep)
    elif clip and encoding.granularity == "channel" and encoding.bits < 8:
        integers, scale, zero = descend_in_rows(target, upper, encoding, keep)
    else:
        # Eight bits lose nothing worth a search.
        scale, zero = choose_scales(value, encoding, importance=importance if clip else None, name=name)
        integers = descend(target, upper, _grid(scale, zero, encoding, order, groups, rows), keep)[0]
    integers = in_place(integers)
    if kept is not None:
        integers = torch.where(kept, integers, spread(zero, value.shape))
    dtype = torch.int8 if encoding.symmetric else torch.uint8
    zeros = None if encoding.symmetric else zero.to(dtype).numpy()
    return AffineTensor(integers.to(dtype).numpy(), scale.numpy(), zeros, encoding)


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
    # [O, I / groups, ...kernel] -> [O, K]
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
    # Scales get the rank of the kernel back: [O, 1] -> [O, 1, ...].
    ones = (1,) * (len(shape) - 1)
    zero = None if made.zero_point is None else made.zero_point.reshape(-1, *ones)
    return AffineTensor(made.values.reshape(shape), made.scale.reshape(-1, *ones), zero, made.encoding)


def _order(hessian: Hessian, encoding: Affine | Palette, act_order: bool, name: str) -> tuple[torch.Tensor, list[int]]:
    """Channels from the cheapest to the costliest (they are taken from the end), and the order of scale groups."""
    import torch

    cost = hessian.diagonal.sum(0)
    columns = len(cost)
    width = encoding.group_size or columns if isinstance(encoding, Affine) else columns
    if columns % width:
        raise EncodingError(
            f"group size {width} does not divide the {columns} input channels",
            fix="use per-channel scales for this layer",
        )
    if not act_order:
        order = torch.arange(columns).flip(0)
        return order, list(range(columns // width))[::-1]
    # Groups of channels stay together, because they share a scale: [K] -> [K / width, width].
    blocks = torch.argsort(cost.reshape(-1, width).sum(1), stable=True)
    within = torch.argsort(cost.reshape(-1, width), dim=1, stable=True)
    return (blocks[:, None] * width + within[blocks]).flatten(), blocks.tolist()


def _grid(
    scale: torch.Tensor, zero: torch.Tensor, encoding: Affine, order: torch.Tensor, groups: int, rows: int
) -> Round:
    """Rounding on scales chosen before: ``(groups * rows, blocks)``, or one for all."""
    reach = len(order) // scale.shape[1]
    shape = (groups, rows, scale.shape[1])
    scales, zeros = (
        value.expand(groups * rows, -1).reshape(shape).permute(2, 0, 1).contiguous() for value in (scale, zero)
    )
    blocks = (order // reach).tolist()

    def rounding(wanted: torch.Tensor, place: int, integers: torch.Tensor) -> torch.Tensor:
        """``wanted``: one input channel of every row, [groups, rows]."""
        return round_on(wanted, scales[blocks[place]], zeros[blocks[place]], encoding, integers)

    return rounding


def _entries(table: torch.Tensor, rows: int) -> Round:
    """Rounding to the nearest entry of the table of each row."""
    tables = table.repeat_interleave(rows // table.shape[0], 0)

    def rounding(wanted: torch.Tensor, place: int, integers: torch.Tensor) -> torch.Tensor:
        # One input channel of every row: [groups, rows] -> [groups * rows, 1], a table each.
        indices = nearest_entry(wanted.reshape(-1, 1), tables)
        integers.copy_(indices.reshape(wanted.shape))
        return tables.gather(1, indices).reshape(wanted.shape)

    return rounding
