"""Data in memory mean what the same data in a file mean, whatever holds them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeship.core.model import Signature, TensorSpec
from edgeship.data.batches import load_samples
from edgeship.data.memory import MOST_BATCHES, GivenData, kept_data, take_data
from edgeship.errors import DataError

IMAGE = TensorSpec("image", "f32", (1, 1, 2, 2))
IDS = TensorSpec("ids", "i64", (1, 3), low=0, high=9)
ONE = Signature((IMAGE,), ())
TWO = Signature((IMAGE, IDS), ())
PIXELS = np.arange(24, dtype=np.float32).reshape(6, 1, 2, 2)
TOKENS = np.arange(18).reshape(6, 3) % 10
LABELS = np.arange(6)


class Dataset:
    """What torch's map-style datasets are: places and a length."""

    def __len__(self):
        return 6

    def __getitem__(self, place):
        return PIXELS[place], LABELS[place]


def keep(tmp_path):
    def kept(make):
        (tmp_path / "kept").mkdir(exist_ok=True)
        return make(tmp_path / "kept")

    return kept


def loader(batch_size):
    import torch

    data = torch.utils.data.TensorDataset(torch.from_numpy(PIXELS), torch.from_numpy(LABELS))
    return torch.utils.data.DataLoader(data, batch_size=batch_size)


def tensors():
    import torch

    return torch.from_numpy(PIXELS)


KINDS = {
    "array": lambda: PIXELS,
    "doubles": lambda: PIXELS.astype(float),
    "tensor": tensors,
    "bfloat16": lambda: tensors().bfloat16(),
    "a tensor that needs gradients": lambda: tensors().requires_grad_(),
    "dict of arrays": lambda: {"image": PIXELS},
    "dict of tensors": lambda: {"image": tensors()},
    "dict with labels": lambda: {"image": PIXELS, "labels": LABELS},
    "pair": lambda: (PIXELS, LABELS),
    "list of samples": lambda: list(PIXELS),
    "list of batches": lambda: [PIXELS[:4], PIXELS[4:]],
    "samples with the model's own batch axis": lambda: [item[None] for item in PIXELS],
    "list of dicts": lambda: [{"image": item} for item in PIXELS],
    "list of pairs": lambda: [(item, label) for item, label in zip(PIXELS, LABELS, strict=True)],
    "generator": lambda: (item for item in PIXELS),
    "data loader": lambda: loader(4),
    "data loader of single samples": lambda: loader(None),
    "dataset": Dataset,
}
LABELLED = {
    "dict with labels", "pair", "list of pairs", "data loader", "data loader of single samples", "dataset",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_the_same_samples(kind, tmp_path):
    data = take_data("calibration", KINDS[kind]())
    reference = kept_data(data, ONE, keep(tmp_path), text=False)
    samples = load_samples(reference.reference, ONE)
    assert [batch["image"].tolist() for batch in samples.inputs] == [item[None].tolist() for item in PIXELS]
    assert (samples.labels is not None) == (kind in LABELLED)
    if samples.labels is not None:
        assert samples.labels.tolist() == LABELS.tolist()
    assert reference.shown == "calibration"
    again = kept_data(take_data("eval", KINDS[kind]()), ONE, keep(tmp_path), text=False)
    assert again.digest == reference.digest


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 3), min_size=1, max_size=6), batch=st.sampled_from([1, 2]), named=st.booleans())
def test_batches_of_any_length_are_joined(cuts, batch, named):
    """Against numpy's own joining: a model of batch 1 takes batches, one of batch 2 takes samples of that shape."""
    total = sum(cuts)
    spec = TensorSpec("image", "f32", (batch, 2, 2))
    values = np.random.default_rng(total).standard_normal((total, *([] if batch == 1 else [batch]), 2, 2)).astype("f")
    pieces = np.split(values, np.cumsum(cuts)[:-1])
    data = take_data("eval", [{"image": piece} if named else piece for piece in pieces])
    assert isinstance(data, GivenData)
    np.testing.assert_array_equal(data.columns(Signature((spec,), ()))["image"], values)


def test_several_inputs_by_place_and_by_name():
    for value in (
        (PIXELS, TOKENS),
        [(image, ids) for image, ids in zip(PIXELS, TOKENS, strict=True)],
        [{"ids": ids, "image": image} for image, ids in zip(PIXELS, TOKENS, strict=True)],
    ):
        columns = take_data("eval", value).columns(TWO)
        np.testing.assert_array_equal(columns["image"], PIXELS)
        np.testing.assert_array_equal(columns["ids"], TOKENS)
    assert list(take_data("eval", (PIXELS, TOKENS, LABELS)).columns(TWO)) == ["image", "ids", "label"]


def test_an_endless_iterable_is_cut_and_says_so():
    def endless():
        while True:
            yield PIXELS[0]

    data = take_data("calibration", endless())
    assert data.cut
    assert data.batches == MOST_BATCHES
    assert not take_data("calibration", list(PIXELS)).cut


def test_texts_are_for_language_models(tmp_path):
    data = take_data("calibration", ["one", "two"])
    reference = kept_data(data, ONE, keep(tmp_path), text=True)
    assert Path(reference.reference).read_text(encoding="utf-8") == "one\ntwo\n"
    with pytest.raises(DataError, match=r"calibration holds texts, and the model takes image:f32\[1,1,2,2\]"):
        kept_data(data, ONE, keep(tmp_path), text=False)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ((PIXELS, TOKENS, LABELS, LABELS), "eval has 4 parts, the model takes 2 inputs: image, ids"),
        (PIXELS, "eval has 1 parts, the model takes 2 inputs"),
        ({"image": PIXELS, "idz": TOKENS}, "eval holds 'idz', which is not an input of the model; did you mean ids?"),
        ({"image": PIXELS}, "eval lacks the input ids"),
        ((PIXELS, TOKENS[:4]), "eval: inputs have different numbers of samples"),
        ((PIXELS[:, :, :1], TOKENS), "eval: image has shape (6, 1, 1, 2), the model takes image:f32[1,1,2,2]"),
        ((PIXELS * np.nan, TOKENS), "eval: image holds NaN or infinity"),
        ((PIXELS, TOKENS.astype("f")), "eval: ids is float32, the model takes i64"),
        ((PIXELS[:0], TOKENS[:0]), "eval holds no samples"),
        ([(PIXELS[0], TOKENS[0]), (PIXELS[0][:, :1], TOKENS[0])], "eval: image has samples of several shapes"),
    ],
)
def test_what_does_not_fit_the_model_is_named_by_its_argument(value, says, tmp_path):
    with pytest.raises(DataError) as raised:
        kept_data(take_data("eval", value), TWO, keep(tmp_path), text=False)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "eval holds no samples"),
        ({}, "eval holds no arrays"),
        (3, "eval is of type int, which holds no data"),
        ([object()], "eval is of type object, which holds no numbers"),
        ([{"image": "x"}], "eval: image is of type str, which holds no numbers"),
        ([PIXELS, (PIXELS, LABELS)], "eval: a batch has 2 parts, the first has 1 parts"),
        (["a", PIXELS], "eval has texts and a ndarray"),
        ([[[1, 2], [3]]], "eval is not an array"),
    ],
)
def test_what_holds_no_data_is_refused_at_once(value, says):
    with pytest.raises(DataError) as raised:
        take_data("eval", value)
    assert says in str(raised.value)
