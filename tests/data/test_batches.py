"""Inputs from files, folders and functions: read in every form, checked against the model, spread evenly."""

import os

import numpy as np
import pytest

from edgeship.core.model import Signature, TensorSpec
from edgeship.data.batches import (
    calibrated_keys,
    calibration_batches,
    describe_data,
    generate_batches,
    load_batches,
    load_samples,
)
from edgeship.errors import DataError, UsageError

IMAGE = TensorSpec("image", "f32", (1, 1, 2, 2), "NCHW")
IDS = TensorSpec("ids", "i64", (1, 3), low=0, high=9)
ONE = Signature((IMAGE,), ())
TWO = Signature((IMAGE, IDS), ())
PIXELS = np.arange(24, dtype=np.float32).reshape(6, 1, 2, 2)


def npz(folder, **arrays) -> str:
    np.savez(folder / "d.npz", **arrays)
    return str(folder / "d.npz")


def test_an_npz_by_name(tmp_path):
    samples = load_samples(npz(tmp_path, image=PIXELS, label=np.arange(6)), ONE)
    assert len(samples) == 6
    assert samples.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert samples.inputs[2]["image"].shape == (1, 1, 2, 2)
    assert np.array_equal(samples.inputs[2]["image"][0], PIXELS[2])


def test_samples_may_carry_the_batch_axis(tmp_path):
    plain = load_batches(npz(tmp_path, image=PIXELS), ONE)
    batched = load_batches(npz(tmp_path, image=PIXELS[:, None]), ONE)
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(plain, batched, strict=True))


def test_an_npy_is_the_only_input(tmp_path):
    np.save(tmp_path / "d.npy", PIXELS)
    assert len(load_samples(str(tmp_path / "d.npy"), ONE)) == 6
    with pytest.raises(DataError, match="holds one array, the model has 2 inputs"):
        load_samples(str(tmp_path / "d.npy"), TWO)


@pytest.mark.parametrize("limit", [1, 2, 4, 5, 6, 7, None])
def test_a_limit_spreads_evenly_and_keeps_labels_with_their_inputs(tmp_path, limit):
    samples = load_samples(npz(tmp_path, image=PIXELS, label=np.arange(6)), ONE, limit)
    assert len(samples) == min(limit or 6, 6)
    assert [int(batch["image"].min() / 4) for batch in samples.inputs] == samples.labels.tolist()
    steps = np.diff([*samples.labels.tolist(), 6])
    assert steps.max() - steps.min() <= 1


def test_integers_keep_their_kind_and_bytes_become_floats(tmp_path):
    ids = np.arange(18, dtype=np.int32).reshape(6, 3) % 10
    samples = load_samples(npz(tmp_path, image=PIXELS.astype(np.uint8), ids=ids), TWO)
    assert samples.inputs[0]["ids"].dtype == np.int64
    assert samples.inputs[0]["image"].dtype == np.float32


def test_data_from_a_function(tmp_path):
    (tmp_path / "d.py").write_text(
        "import numpy as np\ndef load():\n    return {'image': np.ones((2, 1, 2, 2), 'f'), 'label': [1, 0]}\n"
    )
    samples = load_samples(f"{tmp_path / 'd.py'}:load", ONE)
    assert samples.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"image": PIXELS, "imgae": PIXELS}, "holds 'imgae', which is not an input of the model; did you mean image?"),
        ({"label": np.arange(6)}, "lacks the input image; it holds label"),
        ({}, "lacks the input image; it holds nothing"),
        ({"image": PIXELS[0, 0]}, r"image has shape \(2, 2\), the model takes image:f32\[1,1,2,2\]"),
        ({"image": np.float32(3)}, r"image has shape \(\)"),
        ({"image": PIXELS.astype(np.int64)}, "image is int64, the model takes f32"),
        ({"image": PIXELS + np.inf}, "holds NaN or infinity"),
        ({"image": PIXELS[:0]}, "holds no samples"),
        ({"image": PIXELS, "label": np.arange(5)}, "different numbers of samples"),
    ],
)
def test_data_that_does_not_fit_is_named(tmp_path, arrays, says):
    with pytest.raises(DataError, match=says):
        load_samples(npz(tmp_path, **arrays), ONE)


def test_token_ids_outside_the_vocabulary_are_named(tmp_path):
    with pytest.raises(DataError, match="ids holds 12"):
        load_samples(npz(tmp_path, image=PIXELS, ids=np.full((6, 3), 12)), TWO)


def test_floats_for_integers_are_named(tmp_path):
    with pytest.raises(DataError, match="ids is float64, the model takes i64"):
        load_samples(npz(tmp_path, image=PIXELS, ids=np.ones((6, 3))), TWO)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", b"\x93NUMPY\x01\x00"])
def test_a_damaged_file_is_named(tmp_path, content):
    for name in ("d.npz", "d.npy"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            load_samples(str(tmp_path / name), ONE)


def test_a_file_that_is_not_there_is_named(tmp_path):
    for ask in (describe_data, lambda reference: load_samples(reference, ONE)):
        with pytest.raises(DataError, match="does not exist"):
            ask(str(tmp_path / "gone.npz"))


def test_the_digest_follows_the_content(tmp_path):
    before = describe_data(npz(tmp_path, image=PIXELS))
    assert describe_data(npz(tmp_path, image=PIXELS)).digest == before.digest
    assert describe_data(npz(tmp_path, image=PIXELS + 1)).digest != before.digest
    (tmp_path / "v.txt").write_text("1")
    script = f"import numpy, pathlib\ndef load(): return {{'x': numpy.loadtxt({str(tmp_path / 'v.txt')!r})}}\n"
    (tmp_path / "d.py").write_text(script)
    function = describe_data(f"{tmp_path / 'd.py'}:load")
    assert describe_data(f"{tmp_path / 'd.py'}:load").digest == function.digest
    (tmp_path / "v.txt").write_text("2")
    assert describe_data(f"{tmp_path / 'd.py'}:load").digest != function.digest


def test_generated_inputs_follow_the_signature():
    signature = Signature(
        (IMAGE, IDS, TensorSpec("mask", "i64", (1, 3)), TensorSpec("flag", "bool", (2,)),
         TensorSpec("pixels", "f32", (1, 50), low=-1, high=2), TensorSpec("half", "f16", (3,))), ()
    )  # fmt: skip
    batches = generate_batches(signature, 3)
    again = generate_batches(signature, 3)
    other = generate_batches(signature, 3, seed=1)
    for batch, same, different in zip(batches, again, other, strict=True):
        for spec in signature.inputs:
            assert batch[spec.name].shape == spec.shape
            assert batch[spec.name].dtype == spec.numpy_dtype
            assert np.array_equal(batch[spec.name], same[spec.name])
        assert not np.array_equal(batch["image"], different["image"])
        assert batch["mask"].max() == 1, "never all zeros"
        assert batch["ids"].min() >= 0
        assert batch["ids"].max() <= 9
        assert -1 <= batch["pixels"].min() < 0
        assert 1 < batch["pixels"].max() <= 2
    assert not np.array_equal(batches[0]["image"], batches[1]["image"])


@pytest.fixture
def photos(tmp_path):
    from PIL import Image

    for name, level in (("cat", 0), ("dog", 255)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (9, 7), (level, level, level)).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def test_a_folder_of_classes(photos):
    spec = TensorSpec("image", "f32", (1, 3, 4, 5), "NCHW", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.5))
    samples = load_samples(str(photos), Signature((spec,), ()))
    assert samples.labels.tolist() == [0, 0, 1, 1]
    assert np.allclose(samples.inputs[0]["image"][0, :, 0, 0], [-2, -2, -1])
    assert np.allclose(samples.inputs[3]["image"][0, :, 3, 4], [2, 2, 1])


def test_a_folder_without_classes_has_no_labels(photos):
    samples = load_samples(str(photos / "dog"), Signature((TensorSpec("i", "f32", (1, 4, 5, 1), "NHWC"),), ()))
    assert samples.labels is None
    assert samples.inputs[0]["i"].shape == (1, 4, 5, 1)
    assert samples.inputs[0]["i"].max() == 1


def test_a_limit_on_a_folder_meets_every_class(photos):
    spec = TensorSpec("image", "f32", (1, 3, 4, 5), "NCHW")
    assert load_samples(str(photos), Signature((spec,), ()), 2).labels.tolist() == [0, 1]


def test_a_damaged_image_is_named(photos):
    (photos / "dog" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png is not a readable image"):
        load_samples(str(photos), Signature((TensorSpec("image", "f32", (1, 3, 4, 5), "NCHW"),), ()))


def test_a_folder_of_images_for_a_model_without(photos):
    with pytest.raises(DataError, match="does not take one image"):
        load_samples(str(photos), TWO)


def test_a_folder_of_nothing(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        describe_data(str(tmp_path))


def test_the_digest_of_a_folder_follows_its_images(photos):
    before = describe_data(str(photos)).digest
    os.rename(photos / "dog" / "0.png", photos / "cat" / "9.png")
    assert describe_data(str(photos)).digest != before


def test_a_function_that_is_not_there_is_named(tmp_path):
    (tmp_path / "d.py").write_text("def load(): ...")
    with pytest.raises(UsageError, match=r"has no function laod; did you mean .*d\.py:load\?"):
        load_samples(f"{tmp_path / 'd.py'}:laod", ONE)


def test_the_users_data_is_used_where_there_is_any(tmp_path):
    signature = Signature((TensorSpec("x", "f32", (1, 3)),), ())
    path = tmp_path / "x.npz"
    np.savez(path, x=np.arange(30, dtype=np.float32).reshape(10, 3))
    given = calibration_batches(describe_data(str(path)), signature, 4)
    assert [batch["x"][0, 0] for batch in given] == [0, 6, 15, 21]
    assert len(calibration_batches(None, signature, 4, seed=1)) == 4
    assert len(calibration_batches(None, signature, 400)) == 16


def _parts(reference, count):
    whole, rest, kept = (load_batches(reference, ONE, part=part) for part in ("all", "calibration", "check"))
    assert len(whole) == count == len(rest) + len(kept)
    return [{batch["image"].tobytes() for batch in part} for part in (rest, kept)]


@pytest.mark.parametrize("count", [1, 7, 8, 40, 103])
def test_what_is_checked_is_never_what_was_calibrated_on(tmp_path, count):
    images = np.random.default_rng(count).random((count, 1, 2, 2), np.float32)
    rest, kept = _parts(npz(tmp_path, image=images), count)
    assert not rest & kept
    assert len(kept) == (count // 5 if count >= 8 else 0)


def test_equal_samples_are_in_the_same_part_in_whatever_file(tmp_path):
    images = np.random.default_rng(0).random((30, 1, 2, 2), np.float32)
    twice = np.concatenate([images, images[::-1]])
    rest, kept = _parts(npz(tmp_path, image=twice), 60)
    assert not rest & kept
    again, still = _parts(npz(tmp_path, image=images[::-1]), 30)
    assert (again, still) == (rest, kept), "the order of samples does not matter"


def test_samples_that_calibration_saw_are_left_out_of_other_data(tmp_path):
    images = np.random.default_rng(0).random((40, 1, 2, 2), np.float32)
    np.savez(tmp_path / "calibration.npz", image=images[:20])
    np.savez(tmp_path / "evaluation.npz", image=images, label=np.arange(40))
    keys = calibrated_keys(describe_data(str(tmp_path / "calibration.npz")), ONE)
    assert len(keys) == 16
    left = load_samples(str(tmp_path / "evaluation.npz"), ONE, without=keys)
    assert len(left) == 24
    assert set(range(20, 40)) <= set(left.labels.tolist())
    assert calibrated_keys(None, ONE) == frozenset()


def test_images_of_a_folder_are_split_by_what_their_files_hold(tmp_path):
    from PIL import Image

    for place in range(20):
        Image.new("L", (2, 2), color=place).save(tmp_path / f"{place:02}.png")
    rest, kept = _parts(str(tmp_path), 20)
    assert len(rest) == 16
    assert len(kept) == 4
