"""Finding weights in a saved file, when the converter renamed, reshaped or transposed them."""

import numpy as np
import pytest

from edgeship.core.weights import Affine, AffineTensor, EncodedTensor, FloatTensor
from edgeship.errors import LoweringError
from edgeship.lowering.locate import placements


def floats(*shape: int, seed: int = 0) -> FloatTensor:
    return FloatTensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float16))


def integers(*shape: int) -> AffineTensor:
    values = np.random.default_rng(1).integers(-127, 128, shape).astype(np.int8)
    return AffineTensor(values, np.full((shape[0], *[1] * (len(shape) - 1)), 0.5, np.float32), None, Affine())


def test_by_name_with_an_ending() -> None:
    weight = floats(3, 4)
    (placed,) = placements(
        {"a.weight": weight}, {"a.weight": "p_a"}, {"p_ab": floats(3, 4), "p_a_to_fp16": weight}, "X"
    )
    assert (placed.weight, placed.stored, placed.permutation) == ("a.weight", "p_a_to_fp16", None)


def test_by_name_only_when_kind_and_shape_fit() -> None:
    weight = floats(3, 4)
    found: dict[str, EncodedTensor] = {"p_a": floats(3), "p_a_1": integers(3, 4), "other": weight}
    (placed,) = placements({"a": weight}, {"a": "p_a"}, found, "X")
    assert placed.stored == "other"


def test_by_value_after_a_transpose_with_new_axes() -> None:
    weight = floats(5, 1, 3)
    stored = FloatTensor(weight.values.transpose(2, 0, 1).reshape(1, 3, 1, 5).copy())
    (placed,) = placements({"a": weight}, {}, {"noise": floats(3, 5, seed=9), "folded": stored}, "X")
    assert placed.stored == "folded"
    assert placed.permutation == (2, 0, 1)
    assert placed.shape == (1, 3, 1, 5)


def test_integers_by_value() -> None:
    weight = integers(4, 2)
    (placed,) = placements({"a": weight}, {}, {"b": integers(4, 3), "c": integers(4, 2)}, "X")
    assert placed.stored == "c"


def test_a_lost_weight_is_named() -> None:
    with pytest.raises(LoweringError, match=r"left out the weight encoder\.fc"):
        placements({"encoder.fc": floats(3, 4)}, {}, {"b": floats(3, 4, seed=5)}, "Core ML")
