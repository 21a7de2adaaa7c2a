"""Weights that a package keeps in pieces of rows, or with axes of size one at the end, as torch has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, assert_never

import numpy as np

from edgeship.core.weights import AffineTensor, DenseTensor, FloatTensor, PaletteTensor
from edgeship.errors import ArtifactError
from edgeship.runtimes.coreml.stored import as_encoded
from edgeship.runtimes.coreml.weights import locate_stored_weights

if TYPE_CHECKING:
    from pathlib import Path

    from edgeship.core.model import Placement
    from edgeship.core.weights import Array, EncodedTensor


class PlacedWeights(Mapping[str, "EncodedTensor"]):
    """The placed weights of a package, each read when it is asked for.

    Raises:
        ArtifactError: a placement names what is not there, or the package is damaged.
    """

    def __init__(self, path: Path, placements: Sequence[Placement]) -> None:
        self._path, self._found = path, locate_stored_weights(path)
        self._places: dict[str, list[Placement]] = {}
        for placement in placements:
            self._places.setdefault(placement.weight, []).append(placement)
            if placement.stored not in self._found:
                raise self._lacks(placement.weight)

    def __getitem__(self, weight: str) -> EncodedTensor:
        """The weight in torch's shape, its pieces joined along their rows."""
        places = self._places[weight]
        pieces = []
        for place in places:
            piece = as_encoded(self._found[place.stored]())
            if piece is None:
                raise self._lacks(weight)
            pieces.append(piece)
        order = places[0].permutation
        return joined(pieces, None if order is None else len(order))

    def _lacks(self, weight: str) -> ArtifactError:
        return ArtifactError(f"{self._path} does not hold {weight}", fix="build it again")

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def joined(pieces: Sequence[EncodedTensor], rank: int | None) -> EncodedTensor:
    """One weight of its pieces in order.

    Args:
        rank: axes of the weight; None leaves those of the only piece. Axes beyond are of size one.

    Raises:
        ArtifactError: pieces of different kinds, or a scale for all that is not the same in all.
    """
    if rank is None and len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    if any(type(piece) is not type(first) or piece.encoding != first.encoding for piece in pieces):
        raise ArtifactError("the pieces of a weight are stored in different ways", fix="build it again")
    if not isinstance(first, DenseTensor):
        raise ArtifactError(f"the pieces of a weight are stored as {first.encoding}", fix="build it again")

    def whole(role: str, shared: bool = False) -> Array:
        """A role of all pieces: rows one below the other, or what they share."""
        found = [piece.arrays()[role] for piece in pieces]
        return _stacked([_same(found)] if shared else found, rank)

    match first:
        case FloatTensor():
            return FloatTensor(whole("values"))
        case PaletteTensor():
            tables = [piece.arrays()["table"] for piece in pieces]
            table = _same(tables) if first.encoding.group_channels is None else np.concatenate(tables)
            return PaletteTensor(whole("indices"), table, first.encoding)
        case AffineTensor():
            shared = first.encoding.granularity == "tensor"
            zero = None if first.zero_point is None else whole("zero_point", shared)
            return AffineTensor(whole("values"), whole("scale", shared), zero, first.encoding)
        case _:
            assert_never(first)


def _same(arrays: Sequence[Array]) -> Array:
    if any(not np.array_equal(array, arrays[0]) for array in arrays):
        raise ArtifactError("the pieces of a weight do not share what is for all of it", fix="build it again")
    return arrays[0]


def _stacked(arrays: Sequence[Array], rank: int | None) -> Array:
    whole: np.ndarray[Any, Any] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    if rank is None:
        return whole
    if any(size != 1 for size in whole.shape[rank:]):
        raise ArtifactError(f"a weight of {rank} axes is stored as {whole.shape}", fix="build it again")
    return whole.reshape(whole.shape[:rank])
