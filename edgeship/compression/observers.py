"""What calibration remembers of an activation, and how a range is chosen from it.

An `Observer` keeps running extremes in a first sweep over the data and a histogram of fixed size in a second; nothing
else. Zeros are counted apart: every grid holds zero exactly, so they must not make a clip look dear or cheap.

Ways to choose the range that the integers cover:
  - ``minmax``: the smallest and the largest value seen (Krishnamoorthi 2018, arXiv:1806.08342);
  - ``percentile``: 99.99 % of the values between the ends (Wu et al. 2020, arXiv:2004.09602);
  - ``mse``: the range with the least expected squared error (Banner et al. 2019, arXiv:1810.05723);
  - ``entropy``: the clip whose 128 levels lose least Kullback-Leibler information (Migacz 2017, TensorRT).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from edgeship.errors import UsageError

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    Array = npt.NDArray[Any]

Method = Literal["minmax", "percentile", "mse", "entropy"]
METHODS: tuple[str, ...] = get_args(Method)

BINS = 2048
PERCENTILE = 99.99
# Clips tried by "mse" on each side, as fractions of the extreme value seen.
MSE_STEPS = 100


@dataclass
class Observer:
    """Running statistics of one activation. ``low`` and ``high`` always take zero in."""

    low: float = 0.0
    high: float = 0.0
    zeros: int = 0
    counts: Array | None = field(default=None, repr=False)

    def widen(self, value: torch.Tensor) -> None:
        """First sweep: take one tensor into the extremes. Any shape."""
        self.low = min(self.low, float(value.min()))
        self.high = max(self.high, float(value.max()))

    def count(self, value: torch.Tensor) -> None:
        """Second sweep: take one tensor into the histogram, which spans the extremes of the first. Any shape."""
        import numpy as np
        import torch

        if self.counts is None:
            self.counts = np.zeros(BINS, np.float64)
        if self.low == self.high:
            return
        flat = value.detach().reshape(-1).to(torch.float32)
        nonzero = flat[flat != 0]
        self.zeros += int(flat.numel() - nonzero.numel())
        # histc wants finite ends that differ in float32; a range below its resolution keeps its extremes.
        if float(np.float32(self.low)) < float(np.float32(self.high)):
            self.counts += torch.histc(nonzero, BINS, self.low, self.high).double().numpy()

    def centers(self) -> Array:
        """The middle of each bin."""
        import numpy as np

        width = (self.high - self.low) / BINS
        return np.asarray(self.low + width * (np.arange(BINS) + 0.5))


def choose_range(seen: Observer, method: str, levels: int, *, symmetric: bool) -> tuple[float, float]:
    """The range to cover with ``levels`` integers: ``low <= 0 <= high``.

    Args:
        seen: what both sweeps saw.
        method: one of `METHODS`.
        levels: number of integers, 256 or 65536.
        symmetric: the grid spans ``-max(-low, high) .. max(-low, high)`` whatever is chosen here.

    Raises:
        UsageError: an unknown method, or ``entropy`` for more levels than its histogram can tell apart.
    """
    if method not in METHODS:
        raise UsageError(f"calibration method {method!r} is not known", fix=f"use one of {', '.join(METHODS)}")
    if method == "entropy" and levels > BINS:
        raise UsageError("entropy chooses clips for 8 bits only", fix="use minmax, percentile or mse for 16 bits")
    if method == "minmax" or seen.counts is None or seen.counts.sum() == 0:
        return seen.low, seen.high
    if method == "percentile":
        return _percentile(seen)
    return _least_squares(seen, levels, symmetric) if method == "mse" else _entropy(seen, levels)


def _percentile(seen: Observer) -> tuple[float, float]:
    import numpy as np

    assert seen.counts is not None
    # [bins + 1]
    edges = np.linspace(seen.low, seen.high, BINS + 1)
    # Zeros sit in the middle of the order, between the negative and the positive values.
    counts = seen.counts.copy()
    counts[min(int(np.searchsorted(edges, 0.0, "right")) - 1, BINS - 1)] += seen.zeros
    # [bins]: the share of values up to the end of each bin
    share = np.cumsum(counts) / counts.sum()
    tail = (1 - PERCENTILE / 100) / 2
    low = edges[int(np.searchsorted(share, tail, "right"))]
    high = edges[min(int(np.searchsorted(share, 1 - tail)) + 1, BINS)]
    return min(float(low), 0.0), max(float(high), 0.0)


def _least_squares(seen: Observer, levels: int, symmetric: bool) -> tuple[float, float]:
    """Clip error counted on the histogram, rounding error as ``step**2 / 12`` for each value kept."""
    import numpy as np

    assert seen.counts is not None
    centers, counts = seen.centers(), seen.counts
    # Every clip tried is a share of what was seen.
    fractions = np.arange(1, MSE_STEPS + 1) / MSE_STEPS

    def error(low: float, high: float) -> float:
        step = (2 * max(-low, high) if symmetric else high - low) / (levels - 1)
        low, high = (-max(-low, high), max(-low, high)) if symmetric else (low, high)
        beyond = centers - np.clip(centers, low, high)
        kept = float(counts[beyond == 0].sum())
        return float((counts * beyond**2).sum()) + kept * step**2 / 12

    low, high = seen.low, seen.high
    if symmetric:
        return min(((f * low, f * high) for f in fractions), key=lambda ends: error(*ends))
    for _ in range(2):
        high = min((f * seen.high for f in fractions), key=lambda end: error(low, end)) if seen.high > 0 else 0.0
        low = min((f * seen.low for f in fractions), key=lambda end: error(end, high)) if seen.low < 0 else 0.0
    return low, high


def _entropy(seen: Observer, levels: int) -> tuple[float, float]:
    """The clip on magnitudes that keeps the distribution nearest to the unclipped one."""
    import numpy as np

    assert seen.counts is not None
    signed = seen.low < 0 < seen.high
    levels = levels // 2 if signed else levels
    largest = max(-seen.low, seen.high)
    magnitudes, _ = np.histogram(np.abs(seen.centers()), BINS, (0.0, largest), weights=seen.counts)
    best, clip = np.inf, BINS
    for end in range(levels, BINS + 1, 8):
        wanted = magnitudes[:end].copy()
        # What is clipped ends up in the last bin.
        wanted[-1] += magnitudes[end:].sum()
        divergence = _divergence(wanted, magnitudes[:end], levels)
        if divergence < best:
            best, clip = divergence, end
    edge = largest * clip / BINS
    return max(seen.low, -edge), min(seen.high, edge)


def _divergence(wanted: Array, kept: Array, levels: int) -> float:
    """KL divergence of ``wanted`` from ``kept`` merged into ``levels`` and spread over its non-empty bins."""
    import numpy as np

    # Bin -> the level that it is merged into.
    index = np.arange(len(kept)) * levels // len(kept)
    filled = kept > 0
    sums = np.bincount(index, kept, levels)
    sizes = np.maximum(np.bincount(index, filled, levels), 1)
    # A level's mass goes back to its bins that held something, in equal parts.
    spread = np.where(filled, (sums / sizes)[index], 0.0)
    if spread.sum() == 0 or wanted.sum() == 0:
        return float("inf")
    p, q = wanted / wanted.sum(), np.maximum(spread / spread.sum(), 1e-9)
    used = p > 0
    return float((p[used] * np.log(p[used] / q[used])).sum())
