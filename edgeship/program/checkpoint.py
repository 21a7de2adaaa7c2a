"""Checkpoints as ``torch.save`` writes them, read without torch's unpickler: no code runs, sizes are known first.

Both forms are read: the zip file (since torch 1.6) and the older sequence of pickles. What the pickle describes comes
back as plain data with a `TensorRecord` where a tensor is; `Checkpoint.tensor` reads one.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgeship.errors import SourceError
from edgeship.program.pickled import MAX_BYTES, read_pickle
from edgeship.program.pickled_values import Name, Storage, TensorRecord
from edgeship.program.zipped import Zipped

if TYPE_CHECKING:
    import torch

MAGIC = 0x1950A86A20F9469CFC6C
# Tensors that say more numbers than the file holds (expanded masks), in all.
MAX_EXPANDED_BYTES = 256 << 20
_STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip
DTYPES = {
    *_STORAGES.values(), "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
    "float8_e5m2fnuz", "float8_e8m0fnu",
}  # fmt: skip


@dataclass
class Checkpoint:
    """An opened checkpoint.

    Args:
        content: what was saved, as plain data (`edgeship.program.pickled`).
        places: where the bytes of each storage lie in ``file``: begin and length. what: names the file in errors.
    """

    content: Any
    file: BinaryIO
    places: dict[str, tuple[int, int]]
    what: str
    _storages: dict[str, torch.Tensor] = field(default_factory=dict)
    _expanded: int = 0

    def tensor(self, record: TensorRecord) -> torch.Tensor:
        """The tensor that a record describes; those of one storage share it.

        Raises `SourceError` when its numbers are not in the file.

        The shape is the record's.
        """
        import torch

        if record.dtype not in DTYPES:
            raise SourceError(f"{self.what} holds a tensor of {record.dtype[:40]}", fix="save it as float32")
        dtype = getattr(torch, record.dtype)
        count = math.prod(record.shape)
        if count == 0:
            return torch.empty(record.shape, dtype=dtype)
        key = record.storage.key
        if key not in self.places:
            raise SourceError(f"{self.what} lacks the numbers of a tensor", fix="download it again")
        begin, size = self.places[key]
        check_window(self.what, record.shape, record.strides, record.offset, size // dtype.itemsize)
        if count * dtype.itemsize > size:
            self._expanded += count * dtype.itemsize
        if self._expanded > MAX_EXPANDED_BYTES:
            raise SourceError(f"{self.what} declares more numbers than it holds", fix="save contiguous tensors")
        if key not in self._storages:
            self._storages[key] = read_bytes(self.file, begin, size)
        numbers = self._storages[key][: size // dtype.itemsize * dtype.itemsize].view(dtype)
        return torch.as_strided(numbers, record.shape, record.strides, record.offset)


def check_window(what: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, held: int) -> None:
    """Raise `SourceError` unless a strided window lies within ``held`` elements."""
    last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    if len(shape) != len(strides) or min((*shape, *strides, offset, 0)) < 0 or last >= held:
        raise SourceError(
            f"{what} holds {held} numbers for a tensor of shape {list(shape)[:8]}", fix="download it again"
        )


def read_bytes(file: BinaryIO, begin: int, size: int) -> torch.Tensor:
    """Bytes of a file as a tensor of their own. Raises `SourceError` when the file ends before. [size]."""
    import torch

    found = torch.empty(size, dtype=torch.uint8)
    file.seek(begin)
    room: Any = found.numpy()
    if size and file.readinto(room) != size:  # type: ignore[attr-defined]
        raise SourceError("a file ended while it was read", fix="try again")
    return found


def open_checkpoint(path: Path) -> Checkpoint:
    """Read what a checkpoint describes; tensors stay on disk, and whole objects are the records of what they hold.

    Raises:
        UnsafeSourceError: it holds more than tensors and plain data. SourceError: damaged, or no checkpoint.
    """
    return read_checkpoint(path.open("rb"), str(path), inert=True)


def read_checkpoint(file: BinaryIO, what: str, *, inert: bool = False) -> Checkpoint:
    """`open_checkpoint` of an open file; ``what`` names it in errors.

    Args:
        inert: objects of classes that nobody here knows are plain records of what they hold, not a reason to refuse.
    """
    head = file.read(4)
    file.seek(0)
    if head == b"PK\x03\x04":
        return _zipped(file, what, inert)
    if head == b"":
        raise SourceError(f"{what} is not a readable checkpoint: it is empty", fix="download it again")
    return _sequence(file, what, inert)


def storage_of(pid: tuple[Any, ...], what: str) -> Storage:
    """What a pickle means by a storage. Raises `SourceError` for what torch did not write."""
    match pid:
        case ("storage", Name(path), str(key), _, int(count), *rest) if not any(rest):
            dtype = _STORAGES.get(path.rpartition(".")[2])
            if dtype is not None and count >= 0:
                return Storage(key, dtype, count)
    raise SourceError(f"{what} keeps numbers in a way that is not read", fix="save its state_dict as safetensors")


def _zipped(file: BinaryIO, what: str, inert: bool) -> Checkpoint:
    entries = Zipped(file, what)
    if "constants.pkl" in entries:
        raise SourceError(f"{what} is a TorchScript archive", fix="name it alone as the source, without --factory")
    if "data.pkl" not in entries:
        raise SourceError(f"{what} is not a readable checkpoint: it lacks data.pkl", fix="download it again")
    if "byteorder" in entries and entries.read("byteorder", 16) != b"little":
        raise SourceError(f"{what} was saved on a machine of another byte order", fix="save it on this one")
    content = read_pickle(
        io.BytesIO(entries.read("data.pkl", MAX_BYTES)),
        what,
        storage=lambda pid: storage_of(pid, what),
        inert=inert,
    )
    places = {name.removeprefix("data/"): entries.place(name) for name in entries.names() if name.startswith("data/")}
    return Checkpoint(content, file, places, what)


def _sequence(file: BinaryIO, what: str, inert: bool) -> Checkpoint:
    """The older form: magic number, protocol, system, the object, keys of its storages, their numbers."""
    first = read_pickle(_Bounded(file), what, inert=inert)
    if first != MAGIC:
        return Checkpoint(first, file, {}, what)
    sizes: dict[str, tuple[int, int]] = {}

    def storage(pid: tuple[Any, ...]) -> Storage:
        import torch

        found = storage_of(pid, what)
        sizes[found.key] = (found.elements, getattr(torch, found.dtype).itemsize)
        return found

    for _ in range(2):
        read_pickle(_Bounded(file), what)
    content = read_pickle(_Bounded(file), what, storage=storage, inert=inert)
    keys = read_pickle(_Bounded(file), what)
    places: dict[str, tuple[int, int]] = {}
    end = file.seek(0, io.SEEK_CUR)
    whole = file.seek(0, io.SEEK_END)
    for key in keys if isinstance(keys, list) else ():
        file.seek(end)
        count = int.from_bytes(file.read(8), "little")
        if not isinstance(key, str) or key not in sizes or count != sizes[key][0]:
            raise SourceError(f"{what} is not a readable checkpoint: a storage does not fit", fix="download it again")
        begin, size = end + 8, count * sizes[key][1]
        end = begin + size
        if end > whole:
            raise SourceError(f"{what} is not a readable checkpoint: it is cut short", fix="download it again")
        places[key] = (begin, size)
    return Checkpoint(content, file, places, what)


class _Bounded(io.BufferedIOBase):
    """A file of which a pickle may read no more than it needs."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.left = file, MAX_BYTES

    def _count(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise EOFError(f"a pickle of more than {MAX_BYTES} bytes")

    def read(self, size: int | None = -1, /) -> bytes:
        """At most ``size`` bytes."""
        wanted = self.left + 1 if size is None or size < 0 else size
        self._count(min(wanted, self.left + 1) if wanted > self.left else wanted)
        return self.file.read(wanted)

    def readline(self, size: int | None = -1, /) -> bytes:
        """A line, or at most what is left."""
        found = self.file.readline(self.left + 1)
        self._count(len(found))
        return found
