"""Slices of an output that are of like size: a detector's scores are judged beside its boxes, not under them.

One ratio for a whole tensor is that of its largest part. Along each axis the slices are sorted by their size; those
within a factor of `LIKE` of each other are judged together, so that no group is a handful of numbers by chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

# Slices whose sizes (root mean squares) differ by less than this are alike: an 8-bit grid holds both.
LIKE = 8.0
# Fewer numbers than these are no group of their own: what a ratio of a handful says is chance.
FEWEST = 16


class SliceSums:
    """Running sums for each slice along one axis.

    Args:
        size: of the axis; every array here is ``[size]``.
    """

    def __init__(self, size: int) -> None:
        import numpy as np

        self.signal, self.noise = np.zeros(size), np.zeros(size)
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)
        self.found_low, self.found_high = np.full(size, np.inf), np.full(size, -np.inf)
        self._numbers = 0

    def add(self, axis: int, wanted: Array, difference: Array, found: Array, first: int = 0) -> None:
        """Add one sample, ``[..., size, ...]``, or the part of one that begins at slice ``first``."""
        import numpy as np

        others = tuple(place for place in range(wanted.ndim) if place != axis)
        here = slice(first, first + wanted.shape[axis])
        self.signal[here] += (wanted**2).sum(others)
        self.noise[here] += (difference**2).sum(others)
        self.low[here] = np.minimum(self.low[here], wanted.min(others))
        self.high[here] = np.maximum(self.high[here], wanted.max(others))
        self.found_low[here] = np.minimum(self.found_low[here], found.min(others))
        self.found_high[here] = np.maximum(self.found_high[here], found.max(others))
        self._numbers += wanted.size

    @property
    def elements(self) -> int:
        """Numbers in each slice."""
        return self._numbers // len(self.signal)

    @property
    def sizes(self) -> Array:
        """Root mean square of each slice, ``[size]``."""
        import numpy as np

        return np.asarray(np.sqrt(self.signal / max(self.elements, 1)))


@dataclass(frozen=True)
class Group:
    """Slices of like size along one axis.

    Args:
        places: which. elements: how many numbers are in them.
        rms: their root mean square. signal, noise: summed over them.
        constant: the answers are one value in every slice, where the reference's vary in each.
    """

    axis: int
    places: tuple[int, ...]
    elements: int
    signal: float
    noise: float
    constant: bool = False

    @property
    def rms(self) -> float:
        """Root mean square of what is wanted."""
        return float((self.signal / max(self.elements, 1)) ** 0.5)

    def where(self, shape: tuple[int, ...]) -> str:
        """The group as an index: ``[:, 4..11]``; empty when it is the whole axis."""
        if len(self.places) == shape[self.axis]:
            return ""
        return f"[{', '.join(_runs(self.places) if axis == self.axis else ':' for axis in range(len(shape)))}]"


def groups(sums: SliceSums, axis: int, usual: Array | None = None) -> Iterator[Group]:
    """The groups along one axis, largest slices first; slices without any signal are a group of their own.

    Args:
        usual: sizes of the slices on inputs of many kinds, ``[size]``; their sizes in these sums when None. A score
            that happens to be near zero on one kind of inputs is not a slice of another scale.
    """
    import numpy as np

    sizes = sums.sizes if usual is None else usual
    largest = float(sizes.max(initial=0.0))
    if largest == 0:
        steps = np.zeros(len(sizes), int)
    else:
        with np.errstate(divide="ignore"):
            steps = np.where(sizes > 0, np.floor(np.log(largest / sizes) / np.log(LIKE)), -1).astype(int)
    alike = [np.flatnonzero(steps == step) for step in sorted(set(steps.tolist()), key=lambda item: (item < 0, item))]
    for places in _merged(alike, sums.elements):
        varied = bool((sums.high[places] > sums.low[places]).all())
        still = bool((sums.found_high[places] == sums.found_low[places]).all())
        yield Group(
            axis,
            tuple(places.tolist()),
            sums.elements * len(places),
            float(sums.signal[places].sum()),
            float(sums.noise[places].sum()),
            varied and still,
        )


def _merged(alike: list[Array], elements: int) -> list[Array]:
    """Groups of places, those with too few numbers joined to the group before them, or to the one behind."""
    import numpy as np

    merged: list[Array] = []
    for places in alike:
        if merged and min(len(places), len(merged[-1])) * elements < FEWEST:
            merged[-1] = np.sort(np.concatenate([merged[-1], places]))
        else:
            merged.append(places)
    return merged


def _runs(places: tuple[int, ...]) -> str:
    """``4..11`` or ``0, 3, 7..9``; long lists are cut."""
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][1] == place - 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    texts = [str(low) if low == high else f"{low}..{high}" for low, high in runs]
    return " ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
