"""Find each encoded weight in a saved artifact: by the name it was given, or else by its numbers.

Converters rename constants that they cast, and fold a reshape or a transpose into float ones.
"""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeship.core.model import Placement
from edgeship.core.weights import FloatTensor, SparseTensor, same_numbers
from edgeship.errors import EncodingError, LoweringError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from edgeship.core.weights import EncodedTensor


def check_floats(encoded: Mapping[str, EncodedTensor], compute: str, title: str) -> None:
    """Refuse float weights whose width is not that of the program's arithmetic: the constants get that width.

    Args:
        encoded: the decided weights.
        compute: ``float16`` or ``float32``.
        title: the runtime's name, for the error.
    """
    for weight, tensor in encoded.items():
        floats = tensor.inner if isinstance(tensor, SparseTensor) else tensor
        if isinstance(floats, FloatTensor) and str(floats.encoding) != compute:
            raise EncodingError(
                f"{title} cannot keep {weight} as {tensor.encoding} in a {compute} program",
                fix=f"compute in {floats.encoding}, or store the weights as {compute}",
            )


def placements(
    encoded: Mapping[str, EncodedTensor],
    names: Mapping[str, str],
    found: Mapping[str, EncodedTensor],
    title: str,
) -> tuple[Placement, ...]:
    """One placement for every encoded weight.

    Args:
        encoded: the decided weights.
        names: weight -> the name it was given; converters add endings such as ``_to_fp16``.
        found: what the saved file holds, by name.
        title: the runtime's name, for the error.

    Raises:
        LoweringError: a weight is not in the file.
    """
    placed = []
    for weight, tensor in encoded.items():
        place = _by_name(weight, tensor, names.get(weight, ""), found) or _by_value(weight, tensor, found)
        if place is None:
            raise LoweringError(
                f"{title}'s converter left out the weight {weight}",
                fix="keep that weight in float, or report the model",
            )
        placed.append(place)
    return tuple(placed)


def _by_name(weight: str, tensor: EncodedTensor, name: str, found: Mapping[str, EncodedTensor]) -> Placement | None:
    if not name:
        return None
    candidates = [name, *(other for other in found if other.startswith(name + "_"))]
    for candidate in candidates:
        held = found.get(candidate)
        if held is not None and held.encoding.kind == tensor.encoding.kind and held.shape == tensor.shape:
            return Placement(weight, candidate)
    return None


def _by_value(weight: str, tensor: EncodedTensor, found: Mapping[str, EncodedTensor]) -> Placement | None:
    if not isinstance(tensor, FloatTensor):
        equal = (name for name, held in found.items() if not same_numbers(tensor, held))
        return next((Placement(weight, name) for name in equal), None)
    wanted = tensor.values
    long: list[int] = []
    single: list[int] = []
    for axis, size in enumerate(wanted.shape):
        (single if size == 1 else long).append(axis)
    # What the artifact holds in float, without its axes of size one.
    candidates: dict[str, npt.NDArray[Any]] = {}
    for name, held in found.items():
        if isinstance(held, FloatTensor):
            candidates[name] = held.values.reshape([size for size in held.values.shape if size != 1])
    # The order as it is comes first.
    # At most 120 orders of five axes, each compared with the candidates of its shape alone.
    for order in permutations(long):
        turned = wanted.transpose(*order, *single).reshape([wanted.shape[axis] for axis in order])
        for name, values in candidates.items():
            if values.shape == turned.shape and np.array_equal(values, turned):
                # Axes of size one are told apart by nothing, so they stand at the end of the permutation.
                return Placement(weight, name, (*order, *single), tuple(found[name].shape))
    return None
