"""Model inputs from a file, a folder of images, a Python function, or a seed.

Forms of a reference:
  - ``data.npz``: one array an input, the first axis counts samples; ``label`` (or ``labels``) is the answer;
  - ``data.npy``: the only input of a model with one input;
  - a folder of images: one sub-folder a class (names sorted are the labels) or images flat without labels;
  - ``path/to/file.py:function`` or ``package.module:function``: returns what an npz would hold, as a dict.

A sample has the model's input shape without its batch axis when that is 1, or the input shape itself.

What compression is calibrated on says nothing of what it loses elsewhere: given data are split by their content, four
fifths for calibration and one fifth for checks (`Part`), so that every pass comes to the same split by itself.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeship.core.artifact import source_digest
from edgeship.core.model import Signature, TensorSpec
from edgeship.core.profile import DataRef
from edgeship.core.records import suggest
from edgeship.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
# Inputs drawn from a seed instead of data, at most.
GENERATED = 16
LABEL_NAMES = ("label", "labels", "target")
Part = Literal["all", "calibration", "check"]
# One sample of so many is kept for checks; fewer samples than FEWEST are all calibrated on.
CHECK_SHARE = 5
FEWEST = 8


@dataclass(frozen=True)
class Samples:
    """Model inputs, ready to run one by one, and their labels when the data has them."""

    inputs: tuple[dict[str, Array], ...]
    labels: Array | None = None

    def __len__(self) -> int:
        return len(self.inputs)


def describe_data(reference: str) -> DataRef:
    """A reference with the digest of what it holds. Raises `DataError` when it is not there."""
    import numpy as np

    path = Path(reference)
    digest = hashlib.sha256()
    if _is_function(reference):
        # What it returns may depend on files that only it knows.
        for name, value in sorted(_from_function(reference).items()):
            array = np.ascontiguousarray(value)
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
        return DataRef(reference, digest.hexdigest())
    if path.is_dir():
        files = data_files(path)
        for item in files:
            digest.update(item.relative_to(path).as_posix().encode() + b"\0" + source_digest(item).encode())
        if not files:
            raise DataError(f"{reference} holds no images", fix="give a folder of .jpg or .png files, or an .npz")
    elif path.is_file():
        return DataRef(reference, source_digest(path))
    else:
        raise DataError(f"{reference} does not exist", fix="give an .npz, a folder of images, or file.py:function")
    return DataRef(reference, digest.hexdigest())


def data_files(path: Path) -> list[Path]:
    """The files that data are read from: the file itself, or the images of a folder, sorted."""
    if path.is_dir():
        return sorted(item for item in path.rglob("*") if item.suffix.lower() in IMAGE_SUFFIXES)
    return [path]


def load_samples(
    reference: str,
    signature: Signature,
    limit: int | None = None,
    part: Part = "all",
    without: frozenset[bytes] = frozenset(),
) -> Samples:
    """At most ``limit`` samples, spread evenly over the data so that sorted classes are all met.

    Args:
        part: the share for calibration, the share for checks, or all.
        without: keys of samples to leave out, see `calibrated_keys`.

    Returns:
        The samples; none when ``part`` and ``without`` leave none.

    Raises:
        DataError: no samples, an input missing, a wrong shape or dtype, NaN or infinity.
    """
    import numpy as np

    opened = _open(reference, signature)
    chosen = _chosen(opened.keys, part, without)
    if limit is not None and len(chosen) > limit:
        chosen = [chosen[i * len(chosen) // limit] for i in range(limit)]
    columns = opened.columns(chosen)
    inputs: list[dict[str, Array]] = []
    for place in range(len(chosen)):
        # [samples, ...] -> the input's own shape
        inputs.append({spec.name: columns[spec.name][place].reshape(spec.shape) for spec in signature.inputs})
    labels = opened.labels
    return Samples(tuple(inputs), None if labels is None else np.asarray(labels)[chosen])


def load_batches(
    reference: str,
    signature: Signature,
    limit: int | None = None,
    part: Part = "all",
    without: frozenset[bytes] = frozenset(),
) -> list[dict[str, Array]]:
    """The inputs of `load_samples`."""
    return list(load_samples(reference, signature, limit, part, without).inputs)


def calibrated_keys(data: DataRef | None, signature: Signature) -> frozenset[bytes]:
    """Keys of the samples that calibration may have seen: none without data."""
    if data is None:
        return frozenset()
    keys = _open(data.reference, signature).keys
    return frozenset(keys[place] for place in _chosen(keys, "calibration", frozenset()))


def generate_batches(signature: Signature, count: int, seed: int = 0) -> list[dict[str, Array]]:
    """Inputs drawn from a seed: normal floats (or uniform in ``low..high``), uniform integers in ``low..high``.

    Integers of 0 and 1 (masks, types) are all ones first, then ones with zeros behind them, before them, and between:
    padded texts are what a mask is for. An integer input without a range is drawn so too.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    batches: list[dict[str, Array]] = []
    for place in range(count):
        batches.append({spec.name: draw(spec, generator, place) for spec in signature.inputs})
    return batches


def calibration_batches(
    data: DataRef | None, signature: Signature, count: int, seed: int = 0
) -> list[dict[str, Array]]:
    """At most ``count`` inputs of the user's data, without those that are kept for checks; of generated ones at most
    `GENERATED`, which say little more."""
    if data is None:
        return generate_batches(signature, min(count, GENERATED), seed)
    return load_batches(data.reference, signature, count, "calibration")


def draw(spec: TensorSpec, generator: np.random.Generator, place: int) -> Array:
    """One input, the ``place``-th of its kind."""
    import numpy as np

    if spec.is_float:
        if spec.low is not None and spec.high is not None:
            return np.asarray(generator.uniform(spec.low, spec.high, spec.shape), spec.numpy_dtype)
        return np.asarray(generator.standard_normal(spec.shape), spec.numpy_dtype)
    low, high = int(spec.low or 0), 1 if spec.high is None else int(spec.high)
    if spec.dtype == "bool" or (low, high) == (0, 1):
        return _mask(spec.shape, generator, place).astype(spec.numpy_dtype)
    return np.asarray(generator.integers(low, high + 1, spec.shape), spec.numpy_dtype)


def _mask(shape: tuple[int, ...], generator: np.random.Generator, place: int) -> Array:
    """Ones, padded by zeros along the last axis in three of four: behind, before, between. Never all zeros."""
    import numpy as np

    mask = np.ones(shape, bool)
    length = shape[-1] if shape else 1
    kind = ("none", "behind", "before", "between")[place % 4]
    if length == 1:
        return mask if kind == "none" else generator.integers(0, 2, shape).astype(bool)
    kept = int(generator.integers(1, length))
    if kind == "behind":
        mask[..., kept:] = False
    elif kind == "before":
        mask[..., :-kept] = False
    elif kind == "between":
        mask = generator.random(shape) < 0.5
        mask[..., kept] = True
    return mask


def _is_function(reference: str) -> bool:
    head, colon, tail = reference.rpartition(":")
    return bool(colon) and tail.isidentifier() and len(head) > 1 and not Path(reference).exists()


@dataclass(frozen=True)
class _Opened:
    """Data that were found and counted, of which some samples will be read.

    Args:
        keys: a digest a sample, over what it holds. labels: one a sample, when there are any.
        columns: places of samples -> one array an input, ``[places, ...]``.
    """

    keys: tuple[bytes, ...]
    labels: Array | None
    columns: Callable[[Sequence[int]], Mapping[str, Array]]


def _open(reference: str, signature: Signature) -> _Opened:
    path = Path(reference)
    if not _is_function(reference) and path.is_dir():
        return _open_images(path, signature)
    arrays = _from_function(reference) if _is_function(reference) else _from_file(path, signature)
    return _open_arrays(reference, arrays, signature)


def check_arrays(title: str, arrays: Mapping[str, Any], signature: Signature) -> None:
    """Raise `DataError` unless arrays are what an npz for these inputs would hold; ``title`` is what it calls them."""
    _open_arrays(title, arrays, signature)


def _open_arrays(reference: str, arrays: Mapping[str, Any], signature: Signature) -> _Opened:
    import numpy as np

    labels = next((np.asarray(arrays[name]) for name in LABEL_NAMES if name in arrays), None)
    names = {name for spec in signature.inputs for name in spec.spellings}
    stray = [name for name in arrays if name not in names and name not in LABEL_NAMES]
    if stray:
        raise DataError(
            f"{reference} holds {stray[0]!r}, which is not an input of the model", fix=suggest(stray[0], names)
        )
    columns = {spec.name: _check(reference, spec, arrays) for spec in signature.inputs}
    counts = {name: len(column) for name, column in columns.items()}
    if labels is not None and labels.ndim == 0:
        raise DataError(f"{reference} holds one label for all samples", fix="give one a sample")
    if labels is not None:
        counts["label"] = len(labels)
    if len(set(counts.values())) != 1:
        raise DataError(f"{reference}: inputs have different numbers of samples: {counts}", fix="give each the same")
    total = next(iter(counts.values()))
    if total == 0:
        raise DataError(f"{reference} holds no samples", fix="give at least one")
    keys = []
    for place in range(total):
        digest = hashlib.sha256()
        for column in columns.values():
            digest.update(np.ascontiguousarray(column[place]).tobytes())
        keys.append(digest.digest())
    return _Opened(tuple(keys), labels, lambda places: {name: column[places] for name, column in columns.items()})


def _chosen(keys: Sequence[bytes], part: Part, without: frozenset[bytes]) -> list[int]:
    """Places of the samples of one part. Equal samples are in the same part; which it is hangs on content alone."""
    distinct = sorted(set(keys))
    count = len(distinct) // CHECK_SHARE if len(distinct) >= FEWEST else 0
    checked = set(distinct[:count])
    wanted = {"all": set(distinct), "calibration": set(distinct) - checked, "check": checked}[part] - without
    return [place for place, key in enumerate(keys) if key in wanted]


def _from_function(reference: str) -> Mapping[str, Any]:
    from edgeship.data.functions import load_function

    function = load_function(reference)
    try:
        result = function()
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise DataError(f"{reference} failed: {reason}", fix="run it with python to see where") from error
    if not isinstance(result, Mapping):
        raise DataError(f"{reference} returned {type(result).__name__}", fix="return a dict of arrays by input name")
    return result


def _from_file(path: Path, signature: Signature) -> Mapping[str, Any]:
    import numpy as np

    from edgeship.data.numpy_files import check_numpy_file

    try:
        check_numpy_file(path)
        loaded = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist", fix="give an .npz, a folder of images, or file.py:function") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a NumPy file: {error}", fix="write it with numpy.savez") from None
    if isinstance(loaded, np.ndarray):
        if len(signature.inputs) != 1:
            raise DataError(f"{path} holds one array, the model has {len(signature.inputs)} inputs", fix="use an .npz")
        return {signature.inputs[0].name: loaded}
    try:
        return {name: loaded[name] for name in loaded.files}
    except Exception as error:  # zip and pickle errors of a damaged member, of many types
        raise DataError(f"{path} is damaged: {error}", fix="write it again with numpy.savez") from None


def _open_images(folder: Path, signature: Signature) -> _Opened:
    import numpy as np

    from edgeship.data.images import read_image

    images = [spec for spec in signature.inputs if len(spec.shape) == 4]
    if len(signature.inputs) != 1 or len(images) != 1:
        raise DataError(f"{folder} is a folder of images, but the model does not take one image", fix="use an .npz")
    classes = sorted(item.name for item in folder.iterdir() if item.is_dir())
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        of_class = _image_files((folder / name).rglob("*"))
        files += of_class
        labels += [label] * len(of_class)
    if not classes:
        files = _image_files(folder.iterdir())
    if not files:
        raise DataError(f"{folder} holds no images", fix="give .jpg or .png files")
    spec = images[0]

    def columns(places: Sequence[int]) -> dict[str, Array]:
        if not places:
            return {}
        # [c, h, w] each -> [n, c, h, w]
        return {spec.name: np.stack([read_image(files[place], spec) for place in places])}

    keys = tuple(hashlib.sha256(path.read_bytes()).digest() for path in files)
    return _Opened(keys, np.array(labels) if classes else None, columns)


def _image_files(items: Iterable[Path]) -> list[Path]:
    return sorted(item for item in items if item.suffix.lower() in IMAGE_SUFFIXES)


def _check(reference: str, spec: TensorSpec, arrays: Mapping[str, Any]) -> Array:
    import numpy as np

    found = spec.of(arrays)
    if found is None:
        raise DataError(f"{reference} lacks the input {spec.name}", fix=f"it holds {', '.join(arrays) or 'nothing'}")
    column = np.asarray(found)
    wanted = [spec.shape, spec.shape[1:]] if spec.shape[:1] == (1,) else [spec.shape]
    if column.ndim == 0 or tuple(column.shape[1:]) not in wanted:
        raise DataError(
            f"{reference}: {spec.name} has shape {tuple(column.shape)}, the model takes {spec}",
            fix=f"give samples of shape {spec.shape}",
        )
    is_float = spec.is_float
    if is_float != np.issubdtype(column.dtype, np.floating) and not (is_float and column.dtype == np.uint8):
        raise DataError(
            f"{reference}: {spec.name} is {column.dtype}, the model takes {spec.dtype}", fix="convert it first"
        )
    if is_float and not bool(np.isfinite(column).all()):
        raise DataError(f"{reference}: {spec.name} holds NaN or infinity", fix="remove those samples")
    # 0 and 1 only say that it is a mask: others than 1 may mean as much.
    if not is_float and spec.high is not None and spec.high > 1 and column.size:
        low, high = int(column.min()), int(column.max())
        if low < (spec.low or 0) or high > spec.high:
            raise DataError(
                f"{reference}: {spec.name} holds {high if high > spec.high else low}, "
                f"the model takes {int(spec.low or 0)} to {int(spec.high)}",
                fix="use the model's own tokenizer",
            )
    return column.astype(spec.numpy_dtype)
