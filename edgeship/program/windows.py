"""What the windows of a pool see, and pools made of that: maxima as choices of rows, means as products and sums.

Functions of torch operators, traced in the place of a pool; `program.pools` and the tables of converters use them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def adaptive_windows(size: int, wanted: int) -> Tensor:
    """What each of ``wanted`` windows sees of ``size`` places: [wanted, widest], the last repeated in narrower ones."""
    import torch

    starts = [place * size // wanted for place in range(wanted)]
    ends = [-(-(place + 1) * size // wanted) for place in range(wanted)]
    widest = max(end - start for start, end in zip(starts, ends, strict=True))
    counted = torch.arange(widest)
    rows = [torch.clamp(start + counted, max=end - 1) for start, end in zip(starts, ends, strict=True)]
    return torch.stack(rows)


def max_windows(
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int] | None = None,
    padding: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    ceil_mode: bool | None = None,
) -> list[Tensor]:
    """What the windows of a maximum see, an axis each: [windows, kernel], a place of the window where it sees none."""
    import torch

    rank = len(kernel)
    steps, pads, holes = one_an_axis(stride or kernel, rank), one_an_axis(padding or [0], rank), dilation or [1]
    tables = []
    for size, width, step, pad, hole in zip(sizes, kernel, steps, pads, one_an_axis(holes, rank), strict=True):
        reach = hole * (width - 1) + 1
        count = (size + 2 * pad - reach) // step + 1
        if ceil_mode:
            count = -(-(size + 2 * pad - reach) // step) + 1
            # Torch drops a window that starts past the input.
            count -= (count - 1) * step >= size + pad
        # [windows, kernel]
        places = torch.arange(count)[:, None] * step - pad + torch.arange(width) * hole
        seen = (places >= 0) & (places < size)
        first = torch.where(seen, places, size).amin(1, keepdim=True)
        tables.append(torch.where(seen, places, first))
    return tables


def one_an_axis(given: Sequence[int], rank: int) -> list[int]:
    """``given``, or its only number for every axis."""
    numbers = [int(number) for number in given]
    return numbers * rank if len(numbers) == 1 else numbers


def window_shares(windows: Tensor, size: int) -> Tensor:
    """What each of ``size`` places has in the mean of each window: [size, windows], float32."""
    import torch

    shares = torch.zeros(size, windows.shape[0])
    for place, window in enumerate(windows):
        seen = window.unique()
        shares[seen, place] = 1 / len(seen)
    return shares


def shared_out(x: Tensor, shares: Sequence[Tensor]) -> Tensor:
    """``x`` [..., *sizes] by axis of space times ``shares`` [size, windows]: [..., *windows]."""
    for place, share in enumerate(shares):
        axis = x.dim() - len(shares) + place
        x = x @ share if axis == x.dim() - 1 else (x.movedim(axis, -1) @ share).movedim(-1, axis)
    return x


def largest_of(x: Tensor, tables: Sequence[Sequence[Tensor]]) -> Tensor:
    """The largest of each window of ``x`` [..., *sizes], for each axis a choice of rows for each place in a window."""
    import torch

    for number, rows in enumerate(tables):
        axis = x.dim() - len(tables) + number
        best = x.index_select(axis, rows[0])
        for row in rows[1:]:
            best = torch.maximum(best, x.index_select(axis, row))
        x = best
    return x


def largest_and_where(x: Tensor, tables: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """The largest of each window as `largest_of`, and its place in the plane or room of ``x``; the first of equals."""
    import torch

    sizes = x.shape[x.dim() - len(tables) :]
    places = torch.arange(math.prod(sizes)).reshape(sizes).expand(x.shape)
    # The last axis first: of equals, torch names the one with the lowest row, then the lowest column.
    for number in reversed(range(len(tables))):
        axis = x.dim() - len(tables) + number
        rows = tables[number]
        best, where = x.index_select(axis, rows[0]), places.index_select(axis, rows[0])
        for row in rows[1:]:
            other = x.index_select(axis, row)
            better = other > best
            where = torch.where(better, places.index_select(axis, row), where)
            best = torch.maximum(best, other)
        x, places = best, where
    return x, places


def divided_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int,
) -> Tensor:
    """An average pool with a divisor of its own: sums of windows, shared out.

    ``x`` [N, C, ...space].
    """
    found: Tensor = _counted_alike(x, kernel, stride, padding, ceil_mode) * (math.prod(kernel) / divisor)
    return found


def average_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Any:
    """``avg_pool`` whose windows all count alike: what stands at the edges is padded, averaged and scaled back.

    Left alone when every window is whole and counts its padding.

    ``x`` [N, C, ...space].
    """
    import torch

    rank = len(kernel)
    pads = one_an_axis(padding, rank)
    if not ceil_mode and (count_include_pad or divisor or not any(pads)):
        return NotImplemented
    if divisor:
        return divided_pool(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor)
    means = _counted_alike(x, kernel, stride, padding, ceil_mode)
    sizes = x.shape[-rank:]
    if count_include_pad:
        sizes = torch.Size([size + 2 * pad for size, pad in zip(sizes, pads, strict=True)])
        counted = torch.ones([1, 1, *sizes], dtype=x.dtype)
        # Padded already: only what the last window reaches past it is left.
        extra = _past_the_end(x.shape[-rank:], kernel, stride, pads, ceil_mode)
        counted = torch.nn.functional.pad(counted, _edges([0] * rank, extra))
        return means / _pool(rank)(counted, list(kernel), one_an_axis(stride or kernel, rank))
    return means / _counted_alike(torch.ones([1, 1, *sizes], dtype=x.dtype), kernel, stride, padding, ceil_mode)


def _counted_alike(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> Any:
    """Means over whole windows of ``x``, [N, C, ...space], with zeros all around it."""
    import torch

    rank = len(kernel)
    pads = one_an_axis(padding, rank)
    edges = _edges(pads, _past_the_end(x.shape[-rank:], kernel, stride, pads, ceil_mode))
    padded = torch.nn.functional.pad(x, edges) if any(edges) else x
    return _pool(rank)(padded, list(kernel), one_an_axis(stride or kernel, rank))


def _pool(rank: int) -> Any:
    from torch.nn import functional

    return (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[rank - 1]


def _edges(pads: Sequence[int], extra: Sequence[int]) -> list[int]:
    """Zeros before and after each axis of space, the last axis first, as ``pad`` takes them."""
    edges: list[int] = []
    for pad, more in zip(reversed(pads), reversed(extra), strict=True):
        edges += [pad, pad + more]
    return edges


def _past_the_end(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], pads: Sequence[int], ceil_mode: bool
) -> list[int]:
    """How far the last window of each axis reaches past the padding."""
    steps = one_an_axis(stride or kernel, len(kernel))
    extra = []
    for size, width, step, pad in zip(sizes, kernel, steps, pads, strict=True):
        extra.append(_overhang(size, width, step, pad) if ceil_mode else 0)
    return extra


def _overhang(size: int, kernel: int, stride: int, pad: int) -> int:
    """How far the last window reaches past the padding; torch drops windows that start past the input."""
    count = -(-(size + 2 * pad - kernel) // stride) + 1
    if (count - 1) * stride >= size + pad:
        count -= 1
    return max((count - 1) * stride + kernel - size - 2 * pad, 0)


def dilated_maximum(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Any:
    """``max_pool`` with holes in its windows as a choice of rows by axis; left alone without them.

    ``x`` [N, C, ...space].
    """
    if all(hole == 1 for hole in dilation):
        return NotImplemented
    tables = max_windows(x.shape[-len(kernel) :], kernel, stride, padding, dilation, ceil_mode)
    return largest_of(x, [list(table.t()) for table in tables])


def whole_windows(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Any:
    """``max_pool`` whose last windows reach past the end, with the last row repeated there; they see it already.

    ``x`` [N, C, ...space]. Left alone where every window is whole, or has holes.
    """
    import torch

    rank = len(kernel)
    pads = one_an_axis(padding, rank)
    extra = _past_the_end(x.shape[-rank:], kernel, stride, pads, ceil_mode)
    if not any(extra) or any(hole != 1 for hole in dilation):
        return NotImplemented
    for place, more in enumerate(extra):
        axis = x.dim() - rank + place
        x = torch.cat([x, *[x.narrow(axis, x.shape[axis] - 1, 1)] * more], axis) if more else x
    from torch.nn import functional

    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[rank - 1]
    return pool(x, list(kernel), one_an_axis(stride or kernel, rank), pads)
