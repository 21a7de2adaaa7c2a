"""Reads the named constants out of MLIR bytecode, the form of ``main.mlirb``.

Only the sections that hold them are read (https://mlir.llvm.org/docs/BytecodeFormat): strings, dialects, the table of
resources and their data. Everything is checked against the file's size, so that a damaged file is an `ArtifactError`.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

from edgeship.core.units import counted
from edgeship.errors import ArtifactError

MAGIC = b"ML\xefR"
STRINGS, RESOURCES, RESOURCE_TABLE = 0, 5, 6
BLOB = 0


def named_blobs(path: Path) -> dict[str, memoryview]:
    """The data of each named constant, read from the file without a copy."""
    data, places = _read(path)
    return {name: data[start : start + length] for name, (start, length) in places.items()}


def blob_places(path: Path) -> dict[str, tuple[int, int]]:
    """Where the data of each named constant begins in the file, and its bytes."""
    return _read(path)[1]


def unsteady_names(asset: Path) -> dict[str, str]:
    """``facts["nondeterministic"]`` of an asset whose bytes are others in each build; empty where they are the same."""
    from edgeship.compat.coreai import drawn_names

    drawn = drawn_names(blob_places(asset / "main.mlirb"))
    if not drawn:
        return {}
    # The manifest shows it as the reason why two builds differ.
    constants = counted(len(drawn), "constant")
    reason = (
        f"main.mlirb: Core AI's converter draws the names of {constants} (above 64 MB, or made by its own passes); "
        "their numbers are the same"
    )
    return {"nondeterministic": reason}


def _read(path: Path) -> tuple[memoryview, dict[str, tuple[int, int]]]:
    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", fix="build the asset again") from None
    try:
        sections = _sections(data)
        names = _strings(sections[STRINGS])
        if RESOURCES not in sections:
            return data, {}
        return data, _blobs(sections[RESOURCE_TABLE], sections[RESOURCES], names)
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged: {error!r}", fix="build the asset again") from None


@dataclass
class _Cursor:
    data: memoryview
    at: int = 0

    def byte(self) -> int:
        value = self.data[self.at]
        self.at += 1
        return int(value)

    def number(self) -> int:
        """A variable-length integer: as many bytes as the first has trailing zeros, little endian."""
        first = self.byte()
        if first == 0:
            return int.from_bytes(self.take(8), "little")
        extra = (first & -first).bit_length() - 1
        value = first | int.from_bytes(self.take(extra), "little") << 8
        return value >> (extra + 1)

    def take(self, size: int) -> memoryview:
        if size < 0 or self.at + size > len(self.data):
            raise IndexError(f"{size} bytes wanted at {self.at} of {len(self.data)}")
        taken = self.data[self.at : self.at + size]
        self.at += size
        return taken

    def skip_padding(self, alignment: int, start: int) -> None:
        """Move to a multiple of ``alignment`` of the whole file; ``start`` is where this cursor's data begins in it."""
        self.take(-(start + self.at) % max(alignment, 1))

    @property
    def done(self) -> bool:
        return self.at >= len(self.data)


@dataclass
class _Section:
    data: memoryview
    start: int


def _sections(data: memoryview) -> dict[int, _Section]:
    cursor = _Cursor(data)
    if bytes(cursor.take(4)) != MAGIC:
        raise IndexError("not MLIR bytecode")
    cursor.number()
    while cursor.byte():
        pass
    found: dict[int, _Section] = {}
    while not cursor.done:
        kind = cursor.byte()
        size = cursor.number()
        if kind & 0x80:
            cursor.skip_padding(cursor.number(), 0)
        start = cursor.at
        found[kind & 0x7F] = _Section(cursor.take(size), start)
    return found


def _strings(section: _Section) -> list[str]:
    cursor = _Cursor(section.data)
    lengths = [cursor.number() for _ in range(cursor.number())]
    end = len(section.data)
    names = []
    # Lengths are written last string first, each with the zero byte at its end.
    for length in lengths:
        names.append(bytes(section.data[end - length : end - 1]).decode())
        end -= length
    if end < cursor.at:
        raise IndexError("strings run into their table")
    return names[::-1]


def _blobs(table: _Section, resources: _Section, names: list[str]) -> dict[str, tuple[int, int]]:
    rows, data = _Cursor(table.data), _Cursor(resources.data)
    external = rows.number()
    found: dict[str, tuple[int, int]] = {}
    while not rows.done:
        rows.number()
        for _ in range(rows.number()):
            name, size, kind = names[rows.number()], rows.number(), rows.byte()
            entry = _Cursor(data.take(size))
            # Groups of tools come first; constants belong to the dialects after them.
            if kind == BLOB and external <= 0:
                start = resources.start + data.at - size
                alignment, length = entry.number(), entry.number()
                entry.skip_padding(alignment, start)
                found[name] = (start + entry.at, length)
                entry.take(length)
        external -= 1
    return found
