"""Data that lie in memory: arrays, tensors, dicts of them, or an iterable of batches. They become what a file holds.

Forms, and what each means:
  - an array or a tensor ``[N, ...]``: N samples of the only input;
  - a dict of arrays: one entry an input by name, ``label`` (or ``labels``, ``target``) for the answers;
  - a tuple of arrays ``(image, label)``: the inputs in the model's order, then the labels where one more is given;
  - a list, a DataLoader, a Dataset or another iterable: batches, or single samples, each of a form above;
  - a list of texts, for a language model; a path is a text of its own, see `edgeship.data.batches`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.core.model import Signature, TensorSpec
from edgeship.core.profile import DataRef
from edgeship.data.batches import check_arrays, describe_data
from edgeship.data.numpy_files import write_npz
from edgeship.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

# Of an iterable at most so many batches and bytes are taken: a check asks 2000 samples, and calibration fewer.
MOST_BATCHES = 4096
MOST_BYTES = 2**29
_FORMS = "give arrays, tensors, a dict of them by input name, a DataLoader, or a path"
Key = str | int


@dataclass(frozen=True, eq=False)
class GivenData:
    """Data as they were given, in NumPy.

    Args:
        title: what messages call them: the argument's name. batches: how many were taken.
        parts: by input name, or by place where they have none: the batches (or samples) of each.
        whole: each part is one array over all samples. cut: more was there than was taken. texts: for a language model.
    """

    title: str
    parts: Mapping[Key, tuple[Array, ...]]
    whole: bool = False
    batches: int = 1
    cut: bool = False
    texts: tuple[str, ...] = ()

    def columns(self, signature: Signature) -> dict[str, Array]:
        """One array an input and for the labels, the first axis counts samples: what an npz holds.

        Raises:
            DataError: another number of parts than inputs, or parts that do not fit together.
        """
        import numpy as np

        specs = {name: spec for spec in signature.inputs for name in spec.spellings}
        found: dict[str, Array] = {}
        for name, parts in zip(self._named(signature), self.parts.values(), strict=True):
            joined = list(parts) if self.whole else _with_sample_axis(parts, specs.get(name))
            try:
                found[name] = np.concatenate(joined)
            except ValueError as error:
                raise DataError(f"{self.title}: {name} has samples of several shapes: {error}", fix=_FORMS) from None
        return found

    def _named(self, signature: Signature) -> list[str]:
        """The name of every part."""
        names = [spec.name for spec in signature.inputs]
        if any(isinstance(key, str) for key in self.parts):
            return [str(key) for key in self.parts]
        if len(self.parts) == len(names) + 1:
            return [*names, "label"]
        if len(self.parts) != len(names):
            raise DataError(
                f"{self.title} has {len(self.parts)} parts, the model takes {len(names)} inputs: {', '.join(names)}",
                fix="give a dict by name, or the inputs in this order and then the labels",
            )
        return names


def kept_data(
    data: GivenData, signature: Signature, keep: Callable[[Callable[[Path], Path]], Path], *, text: bool
) -> DataRef:
    """Data from memory as a file that a step can read: an ``.npz``, or a text where texts were given.

    Args:
        keep: what puts the file that a function writes into a folder where it stays.
        text: whether the model is a language model with a tokenizer.

    Raises:
        DataError: they do not fit the model's inputs.
    """
    if data.texts:
        if not text:
            names = ", ".join(map(str, signature.inputs))
            raise DataError(f"{data.title} holds texts, and the model takes {names}", fix=_FORMS)
        path = keep(lambda folder: _write_text(folder / f"{data.title}.txt", data.texts))
    else:
        arrays = data.columns(signature)
        check_arrays(data.title, arrays, signature)
        path = keep(lambda folder: write_npz(folder / f"{data.title}.npz", arrays))
    return replace(describe_data(str(path)), title=data.title)


def _write_text(path: Path, texts: tuple[str, ...]) -> Path:
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def take_data(title: str, data: Any) -> str | GivenData | None:
    """Data as a user gives them: a path stays one, everything else is read into NumPy now.

    Raises:
        DataError: nothing in it, or of no form that is known.
    """
    if data is None:
        return None
    if isinstance(data, (str, os.PathLike)):
        return os.fspath(data) if isinstance(os.fspath(data), str) else os.fsdecode(data)
    whole = _parts_of(title, data) if isinstance(data, (Mapping, tuple)) or _is_array(data) else None
    if whole is not None:
        return GivenData(title, {key: (value,) for key, value in whole.items()}, whole=True)
    items = _items(title, data)
    first = next(items, None)
    if first is None:
        raise DataError(f"{title} holds no samples", fix=_FORMS)
    if isinstance(first, str):
        return GivenData(title, {}, texts=(first, *_texts(title, items)))
    return _gathered(title, first, items)


def _gathered(title: str, first: Any, items: Iterator[Any]) -> GivenData:
    """Batches up to the limits."""
    found = _parts_of(title, first)
    parts = {key: [value] for key, value in found.items()}
    count, size, cut = 1, _bytes_of(found), False
    for item in items:
        if count >= MOST_BATCHES or size >= MOST_BYTES:
            cut = True
            break
        found = _parts_of(title, item)
        if found.keys() != parts.keys():
            raise DataError(
                f"{title}: a batch has {_listed(found)}, the first has {_listed(parts)}", fix="give all the same parts"
            )
        for key, value in found.items():
            parts[key].append(value)
        count, size = count + 1, size + _bytes_of(found)
    return GivenData(title, {key: tuple(values) for key, values in parts.items()}, batches=count, cut=cut)


def _bytes_of(parts: Mapping[Key, Array]) -> int:
    return sum(array.nbytes for array in parts.values())


def _listed(parts: Mapping[Key, Any]) -> str:
    if not any(isinstance(key, str) for key in parts):
        return f"{len(parts)} parts"
    return ", ".join(map(str, parts))


def _items(title: str, data: Any) -> Iterator[Any]:
    """What an iterable, or a Dataset that has places and a length, gives one after another."""
    if isinstance(data, Iterable):
        yield from data
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        for place in range(len(data)):
            yield data[place]
    else:
        raise DataError(f"{title} is of type {type(data).__name__}, which holds no data", fix=_FORMS)


def _texts(title: str, items: Iterator[Any]) -> Iterator[str]:
    for item in items:
        if not isinstance(item, str):
            raise DataError(f"{title} has texts and a {type(item).__name__}", fix="give texts alone")
        yield item


def _parts_of(title: str, item: Any) -> dict[Key, Array]:
    """The parts of one batch, or of everything."""
    if isinstance(item, Mapping):
        found: dict[Key, Array] = {str(name): as_array(f"{title}: {name}", value) for name, value in item.items()}
    elif isinstance(item, (tuple, list)) and any(map(_is_array, item)):
        found = {place: as_array(title, value) for place, value in enumerate(item)}
    else:
        found = {0: as_array(title, item)}
    if not found:
        raise DataError(f"{title} holds no arrays", fix=_FORMS)
    return found


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__")


def as_array(title: str, value: Any) -> Array:
    """Anything that is an array, or a list of numbers, in NumPy; a tensor of any device and precision.

    Raises:
        DataError: it holds no numbers.
    """
    import numpy as np

    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy has no bfloat16.
        value = value.float() if value.is_floating_point() and value.element_size() < 4 else value
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{title} is not an array: {reason}", fix=_FORMS) from None
    if array.dtype.kind not in "biuf":
        raise DataError(f"{title} is of type {type(value).__name__}, which holds no numbers", fix=_FORMS)
    return array


def _with_sample_axis(parts: tuple[Array, ...], spec: TensorSpec | None) -> list[Array]:
    """Batches ``[n, ...]``: single samples get an axis in front, those of the model's own batch axis keep theirs."""
    import numpy as np

    if spec is None:
        # Labels, one a sample.
        return [np.atleast_1d(part) for part in parts]
    sample = len(spec.shape)
    if spec.shape[:1] == (1,):
        sample -= 1
    found = []
    for part in parts:
        # [...] -> [1, ...]
        found.append(part[None] if part.ndim == sample else part)
    return found
