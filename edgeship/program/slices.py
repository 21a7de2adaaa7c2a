"""Slices of like scale inside a tensor: what must be measured apart, because one ratio for all hides the small ones.

A detector's output holds boxes of 0 to 640 beside scores of 0 to 1: an error of one box is as large as every score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

# Indices whose largest numbers are within this factor belong together. An index of few numbers may be small by chance,
# as one class's score of a thousand in a handful of samples is: there only a far larger factor says anything.
ALIKE = 16.0
ALIKE_OF_FEW = 256.0
FEW = 64
# What is this much smaller than the largest number of its slice, in every sample, says nothing.
NOTHING = 1e-9


@dataclass(frozen=True)
class Slice:
    """Part of a tensor.

    Args:
        axis: of a sample's array; -1 for all of it. indices: along that axis.
    """

    axis: int = -1
    indices: tuple[int, ...] = ()

    def of(self, values: Array) -> Array:
        """That part of samples ``(N, *shape)``, one row a sample."""
        import numpy as np

        part = values if self.axis < 0 else np.take(values, self.indices, self.axis + 1)
        return part.reshape(len(values), -1)

    def __str__(self) -> str:
        if self.axis < 0:
            return "all"
        first, last = self.indices[0], self.indices[-1]
        if first == last:
            return f"axis {self.axis}, {first}"
        if last - first + 1 == len(self.indices):
            return f"axis {self.axis}, {first} to {last}"
        return f"axis {self.axis}, {len(self.indices)} of its indices"


def slices_of(values: Array) -> list[Slice]:
    """Parts of like scale, the largest first, along the axis on which scales differ most.

    Args:
        values: samples ``(N, *shape)``.

    Returns:
        At least one; `Slice()` alone where scales are alike along every axis.
    """
    import numpy as np

    found: list[Slice] = []
    widest = 0.0
    for axis in range(values.ndim - 1):
        if values.shape[axis + 1] < 2:
            continue
        others = tuple(place for place in range(values.ndim) if place != axis + 1)
        sizes = np.abs(values).max(others)
        if float(sizes.max(initial=0)) <= 0:
            break
        # Spread in octaves; what is zero throughout counts as the smallest that is not.
        seen = sizes[sizes > NOTHING * sizes.max()]
        spread = float(np.log2(seen).std())
        groups = _alike(sizes, ALIKE if values.size // len(sizes) >= FEW else ALIKE_OF_FEW)
        if len(groups) > 1 and spread > widest:
            widest = spread
            found = [Slice(axis, tuple(np.sort(group).tolist())) for group in groups]
    return found or [Slice()]


def _alike(sizes: Array, factor: float) -> list[Array]:
    """Indices in groups of sizes within a factor, from the largest down; what is zero throughout joins the last."""
    import numpy as np

    # From the largest slice down; equal ones keep their order.
    order = np.argsort(-sizes, kind="stable")
    least = NOTHING * float(sizes.max())
    groups: list[list[int]] = []
    top = 0.0
    for index in order:
        size = float(sizes[index])
        if not groups or (size > least and size < top / factor):
            groups.append([])
            top = size
        groups[-1].append(int(index))
    return [np.asarray(group) for group in groups]
