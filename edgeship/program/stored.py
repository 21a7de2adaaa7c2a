"""Tensors on disk, read and written one at a time: a 3B model never has to be in memory whole.

Files are safetensors. Reading is seek and read, not mmap: mapped pages count as this process's memory.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from edgeship.core.artifact import source_digest
from edgeship.core.weights import EncodedTensor, Encoding, rebuild
from edgeship.errors import ArtifactError, WeightsError

if TYPE_CHECKING:
    import numpy as np
    import torch

NUMPY = {
    "F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool", "BF16": "uint16",
}  # fmt: skip
WRITTEN = {name: code for code, name in NUMPY.items() if code != "BF16"}
MAX_HEADER_BYTES = 100 << 20
ENCODED = "encoded.safetensors"
PLACES = "weights.json"


class TensorFile:
    """One safetensors file, read by seek and read.

    Raises:
        WeightsError: not a safetensors file, or shorter than its header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > min(MAX_HEADER_BYTES, size):
                    raise ValueError("its header is longer than the file")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self._start = 8 + length
            self._entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {
                name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]) for name, entry in header.items()
            }
            end = max((entry[3] for entry in self._entries.values()), default=0)
        except (OSError, ValueError, KeyError, TypeError, struct.error, AttributeError) as error:
            raise WeightsError(f"{path} is not readable as safetensors: {error}", fix="download it again") from None
        if size < self._start + end:
            raise WeightsError(
                f"{path} is {size} bytes, {self._start + end} are in its header",
                fix="it is truncated: download it again",
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        return self._entries[name][1]

    def is_floating(self, name: str) -> bool:
        """Whether one tensor holds floats."""
        return self._entries[name][0] in ("F64", "F32", "F16", "BF16")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        """One tensor, or rows ``start`` to ``stop`` of it. bfloat16, which NumPy lacks, comes as float32."""
        import numpy as np

        code, shape, begin, end = self._entries[name]
        if code not in NUMPY:
            raise WeightsError(f"{self.path}: {name} is stored as {code}", fix="store it as float32 or bfloat16")
        dtype = np.dtype(NUMPY[code])
        if shape and (start or stop is not None):
            row = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
            stop = shape[0] if stop is None else min(stop, shape[0])
            begin, end, shape = begin + start * row, begin + stop * row, (stop - start, *shape[1:])
        array = np.empty(int(np.prod(shape, dtype=np.int64)), dtype)
        if array.nbytes != end - begin:
            raise WeightsError(f"{self.path}: {name} takes {end - begin} bytes", fix=f"{array.nbytes} are expected")
        with self.path.open("rb") as file:
            file.seek(self._start + begin)
            read = file.readinto(memoryview(array.data).cast("B")) if array.size else 0
        if read != array.nbytes:
            raise WeightsError(f"{self.path} ends within {name}", fix="it is truncated: download it again")
        if code == "BF16":
            wide = array.astype(np.uint32)
            wide <<= 16
            array = wide.view(np.float32)
        return array.reshape(shape)


@lru_cache(maxsize=64)
def _opened(path: Path, state: tuple[int, ...]) -> TensorFile:
    return TensorFile(path)


def tensor_file(path: Path) -> TensorFile:
    """The file, its header read once as long as it does not change."""
    try:
        found = path.stat()
    except OSError:
        raise ArtifactError(f"{path} no longer exists", fix="build again") from None
    return _opened(path, (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


class TensorWriter:
    """Writes a safetensors file tensor by tensor: the header's place is kept free and filled at the end."""

    def __init__(self, path: Path, tensors: int) -> None:
        self.path = path
        self._room = 4096 + 512 * tensors
        self._header: dict[str, Any] = {}
        self._place = 0
        self._file = path.open("wb")
        self._file.write(b"\0" * (8 + self._room))

    def add(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Append one tensor. Any shape."""
        import numpy as np

        array = np.ascontiguousarray(array)
        end = self._place + array.nbytes
        self._header[name] = {
            "dtype": WRITTEN[array.dtype.name], "shape": list(array.shape), "data_offsets": [self._place, end],
        }  # fmt: skip
        self._place = end
        if array.size:
            self._file.write(memoryview(array.reshape(-1).data).cast("B"))

    def close(self) -> None:
        """Write the header. The file is complete only then."""
        text = json.dumps(self._header).encode()
        if len(text) > self._room:
            self._file.close()
            raise ArtifactError(f"{self.path.name} holds more tensors than announced", fix="report this as a bug")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + text.ljust(self._room))
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


@dataclass(frozen=True)
class Place:
    """Where one float weight lies.

    Args:
        file: absolute. key: its name there. transposed: stored as ``[in, out]``, as some models do.
        kept: the file belongs to the program; else it is the user's, and stays where it is.
    """

    file: Path
    key: str
    transposed: bool = False
    kept: bool = True


class WeightStore(Mapping[str, "torch.Tensor"]):
    """Float weights by name, each read from its file when asked for; never a whole file at once."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self.places = dict(places)

    @classmethod
    def of_file(cls, path: Path) -> WeightStore:
        """Every tensor of one file, under its own name."""
        return cls({name: Place(path, name) for name in tensor_file(path)})

    def __getitem__(self, name: str) -> torch.Tensor:
        """The weight in its own shape, in float32 where it is float, read from the file."""
        import torch

        place = self.places[name]
        value = _widened(torch.from_numpy(tensor_file(place.file).read(place.key)))
        return value.T.contiguous() if place.transposed else value

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of a weight."""
        import torch

        place = self.places[name]
        if place.transposed:
            return self[name][start:stop]
        return _widened(torch.from_numpy(tensor_file(place.file).read(place.key, start, stop)))

    def is_floating(self, name: str) -> bool:
        """Whether a weight holds floats, without reading it."""
        place = self.places[name]
        return tensor_file(place.file).is_floating(place.key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _widened(value: torch.Tensor) -> torch.Tensor:
    """Halves as float32, in which everything here computes. Any shape."""
    return value.float() if value.is_floating_point() else value


class Overlay(Mapping[str, "torch.Tensor"]):
    """Weights of which some were changed: those are in memory, the others where they were."""

    def __init__(self, base: Mapping[str, torch.Tensor], changed: Mapping[str, torch.Tensor]) -> None:
        inner = base if isinstance(base, Overlay) else None
        self.base: Mapping[str, torch.Tensor] = base if inner is None else inner.base
        # A chain and no copy: merged adapters are computed weight by weight.
        self.changed: Mapping[str, torch.Tensor] = (
            changed if inner is None else ChainMap(changed, inner.changed)  # type: ignore[arg-type]
        )

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.changed[name] if name in self.changed else self.base[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.base
        yield from (name for name in self.changed if name not in self.base)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class EncodedStore(MutableMapping[str, EncodedTensor]):
    """Encoded weights by name, on disk: each is written when it is decided and read when it is asked for.

    Args:
        path: the safetensors file; roles are ``<weight>::<role>``. encodings: of the weights that it holds.
        writer: open while weights are being decided.
    """

    def __init__(self, path: Path, encodings: Mapping[str, Encoding], writer: TensorWriter | None = None) -> None:
        self.path = path
        self.encodings = dict(encodings)
        self._writer = writer
        self._roles: dict[str, list[str]] = {}
        if writer is None:
            for key in tensor_file(path):
                name, _, role = key.rpartition("::")
                self._roles.setdefault(name, []).append(role)
            missing = [name for name in self.encodings if name not in self._roles]
            if missing:
                raise ArtifactError(f"{path.parent} lacks the encoded weight {missing[0]}", fix="build again")

    @classmethod
    def create(cls, path: Path, weights: int) -> EncodedStore:
        """An empty one, to be filled with at most ``weights`` weights and then closed."""
        return cls(path, {}, TensorWriter(path, 4 * weights))

    def close(self) -> EncodedStore:
        """End writing; weights can be read from then on."""
        if self._writer is not None:
            self._writer.close()
        return EncodedStore(self.path, self.encodings)

    def __setitem__(self, name: str, tensor: EncodedTensor) -> None:
        if self._writer is None or name in self._roles:
            raise KeyError(f"{name} cannot be written (again)")
        self._roles[name] = []
        for role, array in tensor.arrays().items():
            self._writer.add(f"{name}::{role}", array)
            self._roles[name].append(role)
        self.encodings[name] = tensor.encoding

    def __getitem__(self, name: str) -> EncodedTensor:
        """The weight in its own shape, read from the file."""
        if name not in self.encodings:
            raise KeyError(name)
        file = tensor_file(self.path)
        return rebuild(self.encodings[name], {role: file.read(f"{name}::{role}") for role in self._roles[name]})

    def __delitem__(self, name: str) -> None:
        del self.encodings[name]

    def __contains__(self, name: object) -> bool:
        return name in self.encodings

    def __iter__(self) -> Iterator[str]:
        return iter(self.encodings)

    def __len__(self) -> int:
        return len(self.encodings)


def save_floats(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write float weights that are in memory; link those of another program's folder; leave the user's where they are.

    ``weights.json`` says where each lies, and what the user's files hold: a program with other weights in the same
    place is another program.
    """
    base, changed = (weights.base, weights.changed) if isinstance(weights, Overlay) else (weights, {})
    places = {} if not isinstance(base, WeightStore) else {n: p for n, p in base.places.items() if n not in changed}
    fresh = changed if isinstance(base, WeightStore) else weights
    table: dict[str, list[Any]] = {}
    # Kept files all come from one folder, so their names are free here.
    moved: set[str] = set()
    for name, place in places.items():
        file = str(place.file)
        if place.kept:
            file = place.file.name
            if file not in moved:
                link(place.file, folder / file)
                moved.add(file)
        table[name] = [file, place.key, place.transposed]
    if fresh:
        own = next(name for name in map(_weights_file, range(len(moved) + 1)) if name not in moved)
        with TensorWriter(folder / own, len(fresh)) as writer:
            for name in fresh:
                writer.add(name, fresh[name].detach().contiguous().numpy())
                table[name] = [own, name, False]
    outside = {str(place.file): source_digest(place.file) for place in places.values() if not place.kept}
    (folder / PLACES).write_text(json.dumps({"weights": table, "outside": outside}), encoding="utf-8")


def _weights_file(number: int) -> str:
    return f"weights-{number}.safetensors" if number else "weights.safetensors"


def open_floats(folder: Path) -> WeightStore:
    """What `save_floats` wrote. Raises `WeightsError` when a file is missing or damaged."""
    try:
        table = json.loads((folder / PLACES).read_text(encoding="utf-8"))["weights"]
        places = {
            name: Place(folder / file, key, transposed, kept=not Path(file).is_absolute())
            for name, (file, key, transposed) in table.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise WeightsError(f"{folder / PLACES} cannot be read: {error}", fix="build again") from None
    for file in {place.file for place in places.values()}:
        tensor_file(file)
    return WeightStore(places)


def outside_files(folder: Path) -> dict[Path, str]:
    """Files of the user's in which weights of a saved program lie, with the SHA-256 of what they held when it was
    saved. Empty where there is no such program."""
    try:
        plain = json.loads((folder / PLACES).read_text(encoding="utf-8"))
        return {Path(file): str(digest) for file, digest in plain["outside"].items()}
    except (OSError, ValueError, TypeError, AttributeError, LookupError):
        return {}


def save_encoded(encoded: Mapping[str, EncodedTensor], path: Path) -> None:
    """Write encoded weights, or link the file that they lie in already."""
    if isinstance(encoded, EncodedStore):
        if encoded.path != path:
            link(encoded.path, path)
        return
    with TensorWriter(path, 4 * len(encoded)) as writer:
        for name, tensor in encoded.items():
            for role, array in tensor.arrays().items():
                writer.add(f"{name}::{role}", array)


def link(source: Path, path: Path) -> None:
    """The same bytes under another name, without a copy where the file system allows it."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)
