"""Reads the weight file of an mlprogram (``weights/weight.bin``) without coremltools.

The file is a 64-byte header and then, for every tensor, a 64-byte record (little endian) and its data, each at a
multiple of 64 bytes::

    record:  u32 0xDEADBEEF | u32 data type | u64 bytes of data | u64 offset of data | u64 unused bits at the end

Tensors of fewer than eight bits are one stream of bits, least significant bit first.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from edgeship.errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

SENTINEL = 0xDEADBEEF
RECORD_BYTES = 64

#: Bits of one stored element, by data type.
BITS: dict[str, int] = {
    "bool": 8, "float16": 16, "float32": 32, "float64": 64, "bfloat16": 16,
    "int8": 8, "int16": 16, "int32": 32, "int64": 64, "int4": 4,
    "uint8": 8, "uint16": 16, "uint32": 32, "uint64": 64,
    "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6,
}  # fmt: skip

#: The data type as numbered in a record (another numbering than the one in the program).
RECORD_TYPES: dict[int, str] = {
    1: "float16", 2: "float32", 3: "uint8", 4: "int8", 5: "bfloat16", 6: "int16", 7: "uint16", 8: "int4",
    9: "uint1", 10: "uint2", 11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy type that holds a decoded ``dtype``: one byte per element for everything below eight bits."""
    if dtype == "bfloat16":
        raise ArtifactError("bfloat16 constants are not read", fix="store them as float16 or float32")
    if BITS[dtype] < 8:
        return np.dtype("int8" if dtype.startswith("int") else "uint8")
    return np.dtype(dtype)


def unpack(data: npt.NDArray[np.uint8], dtype: str, count: int) -> npt.NDArray[Any]:
    """Decodes ``count`` elements of ``dtype`` from raw bytes; shares memory with ``data`` from eight bits up."""
    bits = BITS[dtype]
    if data.size * 8 < count * bits:
        raise ArtifactError(f"{data.size} bytes hold fewer than {count} elements of {dtype}", fix="convert again")
    if bits >= 8:
        return data[: count * bits // 8].view(numpy_dtype(dtype))
    if bits == 4:
        values = np.empty(data.size * 2, np.uint8)
        np.bitwise_and(data, 15, out=values[0::2])
        np.right_shift(data, 4, out=values[1::2])
        values = values[:count]
    else:
        stream = np.unpackbits(data, bitorder="little", count=count * bits).reshape(count, bits)
        values = stream @ (1 << np.arange(bits, dtype=np.uint8))
    if dtype.startswith("int"):
        # In place, and modulo 256: a table of 128k tokens is large.
        sign = np.uint8(1 << (bits - 1))
        values ^= sign
        values -= sign
        return values.view(np.int8)
    return values


class BlobFile:
    """One weight file, read by seek and read: pages of a mapped file would count as this process's memory."""

    def __init__(self, path: Path) -> None:
        """Raises ArtifactError if ``path`` is missing or too short to have a header."""
        self.path = path
        if not path.is_file():
            raise ArtifactError(f"{path} is missing", fix="the package was copied only in part: copy or build it again")
        if path.stat().st_size < RECORD_BYTES:
            raise ArtifactError(f"{path} is too short to be a weight file", fix="build the package again")
        self._size = path.stat().st_size
        self._records: dict[int, tuple[str, int, int]] = {}

    def read(self, offset: int, dtype: str, count: int, part: tuple[int, int] | None = None) -> npt.NDArray[Any]:
        """The ``count`` elements of ``dtype`` whose record is at byte ``offset``; ArtifactError if there are none.

        ``part`` is the first and the last but one of those that are wanted; the first begins a byte.
        """
        with self.path.open("rb") as file:
            stored, start, size = self._record(file, offset)
            # A bool is stored as uint8, and a record names the width only: int4 and uint4 may stand for each other.
            if BITS.get(stored) != BITS[dtype]:
                raise self._damaged(offset, f"it holds {stored} where the program declares {dtype}")
            if size * 8 < count * BITS[dtype]:
                raise self._damaged(offset, f"{size} bytes where {count} elements of {dtype} belong")
            if part is not None:
                start += part[0] * BITS[dtype] // 8
                count = part[1] - part[0]
            data = np.empty(-(-count * BITS[dtype] // 8), np.uint8)
            file.seek(start)
            if file.readinto(data.data) != data.size:
                raise self._damaged(offset, "the file ends inside it")
        return unpack(data, dtype, count)

    def _record(self, file: BinaryIO, offset: int) -> tuple[str, int, int]:
        """What the record at ``offset`` says: type, first byte, bytes."""
        if offset not in self._records:
            file.seek(offset)
            head = file.read(RECORD_BYTES)
            if len(head) < RECORD_BYTES:
                raise self._damaged(offset, "the file ends before it")
            sentinel, code, size, start, _ = struct.unpack_from("<IIQQQ", head)
            if sentinel != SENTINEL:
                raise self._damaged(offset, "no record starts there")
            if start + size > self._size:
                raise self._damaged(offset, "the file ends inside it")
            self._records[offset] = RECORD_TYPES.get(code, f"type {code}"), start, size
        return self._records[offset]

    def _damaged(self, offset: int, why: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path}: the tensor at byte {offset} cannot be read: {why}", fix="build the package again"
        )
