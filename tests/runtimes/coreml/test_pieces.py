"""Weights in pieces are joined to what they were."""

from __future__ import annotations

import numpy as np
import pytest

from edgeship.core.weights import Affine, AffineTensor, FloatTensor, Palette, PaletteTensor, same_numbers
from edgeship.errors import ArtifactError, EncodingError
from edgeship.lowering.coreml.places import Piece, parts, shape_of
from edgeship.runtimes.coreml.pieces import joined

RANDOM = np.random.default_rng(0)


def _integers(*shape):
    return RANDOM.integers(-7, 8, shape).astype(np.int8)


WEIGHTS = {
    "float": FloatTensor(RANDOM.normal(size=(24, 8)).astype(np.float16)),
    "tensor": AffineTensor(_integers(24, 8), np.full((1, 1), 0.5, np.float32), None, Affine(4, True, "tensor")),
    "channel": AffineTensor(_integers(24, 8), RANDOM.random((24, 1), np.float32), None, Affine(8)),
    "group": AffineTensor(
        _integers(24, 8).view(np.uint8) & 15, RANDOM.random((24, 2), np.float32), _integers(24, 2).view(np.uint8) & 15,
        Affine(4, False, "group", 4),
    ),
    "palette": PaletteTensor(_integers(24, 8).view(np.uint8) & 15, RANDOM.random((1, 16), np.float32), Palette(4)),
    "palettes": PaletteTensor(_integers(24, 8).view(np.uint8) & 15, RANDOM.random((3, 16), np.float32), Palette(4, 8)),
}  # fmt: skip


def _stored(tensor, piece):
    """A piece as a package gives it back, with four axes."""
    found = {name: array.copy() for name, array in parts(tensor, piece).items()}
    shape = shape_of("w", tensor).of(piece)
    assert {name: array.size for name, array in found.items()} == {
        {"float": "val"}.get(shape.kind, "indices" if "lut" in shape.others else "data"): int(np.prod(shape.shape)),
        **{name: int(np.prod(sizes)) for name, sizes in shape.others.items()},
    }
    tail = (1,) * 2
    if isinstance(tensor, FloatTensor):
        return FloatTensor(found["val"].reshape(shape.shape))
    if isinstance(tensor, PaletteTensor):
        return PaletteTensor(found["indices"].reshape(shape.shape), found["lut"], tensor.encoding)
    zero = found.get("offset")
    return AffineTensor(
        found["data"].reshape(shape.shape), found["scale"].reshape(*found["scale"].shape, *tail),
        None if zero is None else zero.reshape(*zero.shape, *tail), tensor.encoding,
    )  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_pieces_of_rows_make_the_weight_again(name):
    tensor = WEIGHTS[name]
    pieces = [Piece("w", start, start + 8, 4) for start in (0, 8, 16)]
    assert same_numbers(tensor, joined([_stored(tensor, piece) for piece in pieces], 2)) == ""
    assert same_numbers(tensor, joined([_stored(tensor, Piece("w", rank=4))], 2)) == ""


def test_pieces_that_do_not_belong_together_are_refused():
    one, two = (_stored(WEIGHTS["tensor"], Piece("w", start, start + 12, 4)) for start in (0, 12))
    two.scale[:] = 2
    with pytest.raises(ArtifactError, match="do not share"):
        joined([one, two], 2)
    with pytest.raises(ArtifactError, match="different ways"):
        joined([one, FloatTensor(np.zeros((12, 8, 1, 1), np.float16))], 2)


def test_a_piece_that_cuts_a_group_is_refused():
    with pytest.raises(EncodingError, match="cut a group"):
        parts(WEIGHTS["palettes"], Piece("w", 0, 12, 4))
