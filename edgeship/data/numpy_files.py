"""Look at .npy and .npz files before numpy reads them: what they would unpack to is known from their first bytes."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgeship.core.units import human_bytes
from edgeship.errors import DataError

if TYPE_CHECKING:
    import numpy as np

# Arrays are held whole while samples are chosen from them.
MAX_BYTES = 2**31
_HEAD = 1 << 16


def check_numpy_file(path: Path) -> None:
    """Raise `DataError` for a file whose arrays are more than they say, larger than memory should hold, or no numbers.

    A member of an .npz that is compressed a thousandfold is never unpacked.
    """
    with path.open("rb") as file:
        head = file.read(6)
        file.seek(0)
        if head == b"\x93NUMPY":
            sizes = {path.name: _array_bytes(file, path.stat().st_size, str(path))}
        elif head.startswith(b"PK"):
            sizes = _members(file, path)
        else:
            raise DataError(f"{path} is not a NumPy file: it begins with {head!r}", fix="write it with numpy.savez")
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise DataError(
            f"{path} unpacks to {human_bytes(total)}, most of it {largest[:40]!r}",
            fix=f"give fewer samples: {human_bytes(MAX_BYTES)} at most",
        )


def write_npz(path: Path, arrays: Mapping[str, Any]) -> Path:
    """Write arrays by name as ``numpy.savez`` does, without the time of day: equal arrays give equal bytes."""
    import numpy as np

    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            # A stream has no size beforehand, and may be longer than a zip without its larger fields holds.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=array.nbytes >= 2**31) as member:
                np.lib.format.write_array(member, array)  # type: ignore[no-untyped-call]
    return path


def _members(file: BinaryIO, path: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as member:
                    start = member.read(_HEAD)
                where = f"{path}, {entry.filename[:60]!r},"
                sizes[entry.filename] = _array_bytes(io.BytesIO(start), entry.file_size, where)
    except DataError:
        raise
    except Exception as error:  # damaged archives raise errors of zipfile's, zlib's, and of many others' types
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{path} is not a NumPy file: {reason}", fix="write it with numpy.savez") from None
    return sizes


def _array_bytes(start: BinaryIO, size: int, where: str) -> int:
    """Bytes of an array in memory, which are those of its member without the header."""
    shape, dtype = _header(start, where)
    if dtype.hasobject:
        raise DataError(
            f"{where} is not a NumPy file of numbers: it holds Python objects", fix="save arrays of numbers"
        )
    count = math.prod(shape)
    if any(item < 0 for item in shape) or count * dtype.itemsize != size - start.tell():
        raise DataError(
            f"{where} is not a NumPy file: {size - start.tell()} bytes for an array of shape {str(shape)[:60]}",
            fix="write it again with numpy.savez",
        )
    return count * dtype.itemsize


def _header(start: BinaryIO, where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    from numpy.lib import format as numpy_format

    reader: Any = numpy_format
    try:
        version = reader.read_magic(start)
        read = reader.read_array_header_1_0 if version == (1, 0) else reader.read_array_header_2_0
        shape, _, dtype = read(start)
    except Exception as error:  # texts that are no header raise errors of the parser's
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{where} is not a NumPy file: {reason}", fix="write it again with numpy.savez") from None
    return shape, dtype
