"""Operators that no converter has, as programs of those that all have: running products and extremes, middles,
distances, places in a sorted row, and recurrent layers with a projection.

Each function takes its operator's arguments and answers as it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeship.program.cells import lstm_step

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule

# Distances of more pairs than this are taken through a product of matrices, as torch does, instead of pair by pair.
MAX_PAIRED_ELEMENTS = 1 << 24


def cumprod(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The product of all elements up to each one along ``dim``: [..., n, ...] -> [..., n, ...]."""
    import torch

    x = x if dtype is None else x.to(dtype)
    if not x.is_floating_point() and dtype is None:
        x = x.to(torch.int64)
    for shift in _shifts(x, dim):
        head, later, earlier = _shifted(x, dim, shift)
        x = torch.cat([head, later * earlier], dim)
    return x


def cummax(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest element up to each one along ``dim``, and where the last such stands (int64)."""
    return _running(x, dim, largest=True)


def cummin(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest element up to each one along ``dim``, and where the last such stands (int64)."""
    return _running(x, dim, largest=False)


def _running(x: torch.Tensor, dim: int, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Both of [..., n, ...]; in log2(n) rounds, each with twice the reach (Hillis and Steele, 1986)."""
    import torch

    if x.dim() == 0:
        return x, torch.zeros_like(x, dtype=torch.int64)
    shape = [1] * x.dim()
    shape[dim] = x.shape[dim]
    places = torch.arange(x.shape[dim]).reshape(shape).expand(x.shape)
    for shift in _shifts(x, dim):
        head, later, earlier = _shifted(x, dim, shift)
        first, own, before = _shifted(places, dim, shift)
        stays = later >= earlier if largest else later <= earlier
        x = torch.cat([head, torch.where(stays, later, earlier)], dim)
        places = torch.cat([first, torch.where(stays, own, before)], dim)
    return x, places


def _shifts(x: torch.Tensor, dim: int) -> list[int]:
    """1, 2, 4, ... below the length of ``dim``."""
    length = x.shape[dim] if x.dim() else 1
    return [1 << power for power in range(max(length - 1, 0).bit_length())]


def _shifted(x: torch.Tensor, dim: int, shift: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first ``shift`` elements, those behind them, and for each of these the one ``shift`` before it."""
    rest = x.shape[dim] - shift
    return x.narrow(dim, 0, shift), x.narrow(dim, shift, rest), x.narrow(dim, 0, rest)


def searchsorted(
    ordered: torch.Tensor,
    values: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: torch.Tensor | None = None,
) -> torch.Tensor:
    """How many elements of the rising rows ``ordered`` [..., n] stand before each value [..., m]: [..., m]."""
    import torch

    ordered = ordered if sorter is None else ordered.gather(-1, sorter)
    values = values if isinstance(values, torch.Tensor) else torch.tensor(values)
    # [..., n] and [..., m] -> [..., m, n]; one row serves values of any shape.
    rows, sought = ordered.unsqueeze(-2) if ordered.dim() > 1 else ordered, values.unsqueeze(-1)
    before = rows <= sought if right or side == "right" else rows < sought
    counts: torch.Tensor = before.sum(-1, dtype=torch.int32 if out_int32 else torch.int64)
    return counts


def cdist(x: torch.Tensor, y: torch.Tensor, p: float = 2.0, compute_mode: int | None = None) -> torch.Tensor:
    """The p-norm of all differences of rows: [..., n, d] and [..., m, d] -> [..., n, m]."""
    import torch

    pairs = x.shape[-2] * y.shape[-2]
    if p == 2.0 and pairs * x.shape[-1] > MAX_PAIRED_ELEMENTS:
        squares = (x * x).sum(-1, keepdim=True) + (y * y).sum(-1).unsqueeze(-2)
        return torch.clamp_min(squares - 2.0 * (x @ y.mT), 0.0).sqrt()
    # [..., n, 1, d] - [..., 1, m, d]
    distances: torch.Tensor = torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, dim=-1)
    return distances


def hypot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The length of (x, y), element by element; squares of large values do not overflow."""
    import torch

    x, y = torch.abs(x), torch.abs(y)
    larger, smaller = torch.maximum(x, y), torch.minimum(x, y)
    ratio = smaller / torch.where(larger == 0, torch.ones_like(larger), larger)
    return larger * torch.sqrt(1 + ratio * ratio)


def fmin(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The smaller one, element by element; where one is NaN, the other."""
    import torch

    return torch.where(torch.isnan(x), y, torch.where(torch.isnan(y), x, torch.minimum(x, y)))


def fmax(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The larger one, element by element; where one is NaN, the other."""
    return -fmin(-x, -y)


def kthvalue(x: torch.Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The k-th smallest element along ``dim``, counted from 1, and where it stands: [..., n, ...] -> [..., ...]."""
    import torch

    if x.dim() == 0:
        return x, torch.zeros_like(x, dtype=torch.int64)
    values, places = torch.sort(x, dim)
    found, place = values.narrow(dim, k - 1, 1), places.narrow(dim, k - 1, 1)
    return (found, place) if keepdim else (found.squeeze(dim), place.squeeze(dim))


def median(x: torch.Tensor, dim: int, keepdim: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The lower of the middle elements along ``dim``, and where it stands: [..., n, ...] -> [..., ...]."""
    return kthvalue(x, (x.shape[dim] + 1) // 2 if x.dim() else 1, dim, keepdim)


def median_of_all(x: torch.Tensor) -> torch.Tensor:
    """The lower of the middle elements of any shape, a scalar."""
    return median(x.reshape(-1), 0)[0]


def either(condition: torch.Tensor, yes: GraphModule, no: GraphModule, operands: Any) -> tuple[torch.Tensor, ...]:
    """``torch.cond``: both sides are computed, and one is taken. Shapes of the sides are alike."""
    import torch

    sides = zip(yes(*operands), no(*operands), strict=True)
    return tuple(torch.where(condition, taken, other) for taken, other in sides)


def hardshrink(x: torch.Tensor, lambd: float = 0.5) -> torch.Tensor:
    """Zero between ``-lambd`` and ``lambd``, element by element."""
    import torch

    return torch.where(torch.abs(x) > lambd, x, torch.zeros_like(x))


def kron(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Each element of ``x`` times all of ``y``: [..., n, m] and [..., p, q] -> [..., n * p, m * q]."""
    rank = max(x.dim(), y.dim())
    first = x.reshape([1] * (rank - x.dim()) + list(x.shape))
    second = y.reshape([1] * (rank - y.dim()) + list(y.shape))
    sizes = [one * other for one, other in zip(first.shape, second.shape, strict=True)]
    for axis in range(rank):
        # Axes of the two alternate: [n, 1, m, 1] * [1, p, 1, q]
        first, second = first.unsqueeze(2 * axis + 1), second.unsqueeze(2 * axis)
    return (first * second).reshape(sizes)


def bilinear(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x W y`` for each output: [..., n], [..., m] and [out, n, m] -> [..., out]."""
    import torch

    # [..., n] and [out, n, m] -> [..., out, m]
    rows = torch.nn.functional.linear(x, weight.transpose(1, 2).reshape(-1, weight.shape[1]))
    rows = rows.reshape(*x.shape[:-1], weight.shape[0], weight.shape[2])
    found = (rows * y.unsqueeze(-2)).sum(-1)
    return found if bias is None else found + bias


def fold(
    x: torch.Tensor,
    output_size: list[int],
    kernel: list[int],
    dilation: list[int],
    padding: list[int],
    stride: list[int],
) -> torch.Tensor:
    """Patches added up where they overlap (``nn.Fold``): [N, C * kh * kw, L] -> [N, C, H, W].

    A transposed convolution with a kernel of ones and zeros puts each row of a patch where it belongs.
    """
    import torch

    batched = x if x.dim() == 3 else x.unsqueeze(0)
    area = kernel[0] * kernel[1]
    channels = batched.shape[1] // area
    high, wide = (
        (output_size[axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    )
    patches = batched.reshape(-1, batched.shape[1], high, wide)
    places = torch.arange(area)
    units = (places.unsqueeze(0) == places.unsqueeze(1)).to(x.dtype).reshape(area, 1, *kernel).repeat(channels, 1, 1, 1)
    extra = [
        output_size[axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1 - (size - 1) * stride[axis]
        for axis, size in ((0, high), (1, wide))
    ]
    whole = torch.nn.functional.conv_transpose2d(patches, units, stride=stride, dilation=dilation, groups=channels)
    # What no patch reaches at the end is zero; padding is cut off.
    whole = torch.nn.functional.pad(whole, [0, extra[1], 0, extra[0]])
    made = whole.narrow(2, padding[0], output_size[0]).narrow(3, padding[1], output_size[1])
    return made if x.dim() == 3 else made.squeeze(0)


def embedding_bag(
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Sums (mode 0), means (1) or largest (2) of bags of rows: [rows, d], [n] and [bags] -> [bags, d].

    Offsets may come at run time: which bag an index is in is compared, not looked up. The other three results, which
    torch uses for gradients, are empty.
    """
    import torch

    count = indices.shape[0]
    places = torch.arange(count)
    ends = (
        offsets[1:] if include_last_offset else torch.cat([offsets[1:], torch.full((1,), count, dtype=offsets.dtype)])
    )
    starts = offsets[:-1] if include_last_offset else offsets
    # [bags, n]
    inside = (places >= starts.unsqueeze(1)) & (places < ends.unsqueeze(1))
    if padding_idx is not None and padding_idx >= 0:
        inside = inside & (indices != padding_idx)
    rows = torch.nn.functional.embedding(indices, weight)
    rows = rows if weights is None else rows * weights.unsqueeze(1)
    empty = torch.zeros(0, dtype=torch.int64)
    number = inside.to(rows.dtype).sum(1, keepdim=True)
    if mode == 2:
        lowest = torch.full_like(rows, torch.finfo(torch.float16).min)
        found = torch.where(inside.unsqueeze(2), rows, lowest).amax(1)
        found = torch.where(number > 0, found, torch.zeros_like(found))
    else:
        found = inside.to(rows.dtype) @ rows
        found = found / torch.clamp_min(number, 1.0) if mode == 1 else found
    return found, empty, empty, empty


def rrelu(x: torch.Tensor, lower: float = 1 / 8, upper: float = 1 / 3, *_: Any) -> torch.Tensor:
    """At inference the slope is the middle of its range."""
    import torch

    return torch.nn.functional.leaky_relu(x, (lower + upper) / 2)


def projected_lstm(
    x: torch.Tensor,
    states: list[torch.Tensor],
    weights: list[torch.Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An LSTM whose hidden state is projected (Sak et al., 2014), step by step.

    ``x`` [T, N, in] or [N, T, in]; states [layers * directions, N, projected] and [layers * directions, N, hidden];
    five weights a direction with biases, three without: [4 hidden, in], [4 hidden, projected], two biases, and last
    [projected, hidden].
    """
    import torch

    x = x.transpose(0, 1) if batch_first else x
    directions = 2 if bidirectional else 1
    count = 5 if has_biases else 3
    last_hidden, last_cells = [], []
    for layer in range(layers):
        sides = []
        for direction in range(directions):
            place = layer * directions + direction
            *held, projection = weights[place * count : (place + 1) * count]
            hidden, cell = states[0][place], states[1][place]
            outputs: list[torch.Tensor] = []
            steps = range(x.shape[0]) if direction == 0 else reversed(range(x.shape[0]))
            for step in steps:
                hidden, cell = lstm_step(x[step], (hidden, cell), *held)
                hidden = torch.nn.functional.linear(hidden, projection)
                outputs.append(hidden)
            last_hidden.append(hidden)
            last_cells.append(cell)
            sides.append(torch.stack(outputs if direction == 0 else outputs[::-1]))
        # [T, N, projected] a side -> [T, N, directions * projected]
        x = torch.cat(sides, -1)
    answers = x.transpose(0, 1) if batch_first else x
    return answers, torch.stack(last_hidden), torch.stack(last_cells)
