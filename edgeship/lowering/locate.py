"""Find where Core AI's converter put float weights that it reshaped or transposed while folding constants."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np

from edgeship.core.model import Placement
from edgeship.core.weights import FloatTensor
from edgeship.errors import LoweringError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgeship.core.weights import EncodedTensor


def placements(
    encoded: Mapping[str, EncodedTensor], names: Mapping[str, str], found: Mapping[str, EncodedTensor]
) -> tuple[Placement, ...]:
    """One placement for every encoded weight.

    Integers keep the name that they were given. A float constant before, say, a reshape is folded into one of another
    name and shape; it is found by its values.

    Args:
        encoded: the decided weights.
        names: weight -> the name it was given.
        found: what the saved file holds, by name.

    Raises:
        LoweringError: a weight is not in the file.
    """
    placed = []
    for weight, tensor in encoded.items():
        stored = names.get(weight, "")
        if stored in found:
            placed.append(Placement(weight, stored))
            continue
        moved = _by_value(weight, tensor, found) if isinstance(tensor, FloatTensor) else None
        if moved is None:
            raise LoweringError(
                f"Core AI's converter left out the weight {weight}",
                fix="keep that weight in float, or report the model",
            )
        placed.append(moved)
    return tuple(placed)


def _by_value(weight: str, tensor: FloatTensor, found: Mapping[str, EncodedTensor]) -> Placement | None:
    wanted = tensor.values
    long = [axis for axis, size in enumerate(wanted.shape) if size != 1]
    single = [axis for axis, size in enumerate(wanted.shape) if size == 1]
    candidates = [(name, held.values) for name, held in found.items() if isinstance(held, FloatTensor)]
    # The order as it is comes first.
    for order in permutations(long):
        turned = wanted.transpose(*order, *single).reshape([wanted.shape[axis] for axis in order])
        for name, values in candidates:
            alike = tuple(size for size in values.shape if size != 1) == turned.shape
            if alike and np.array_equal(values.reshape(turned.shape), turned):
                # Axes of size one are told apart by nothing, so they stand at the end of the permutation.
                return Placement(weight, name, (*order, *single), tuple(values.shape))
    return None
