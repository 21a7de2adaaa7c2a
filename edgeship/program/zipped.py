"""Read zip files that torch writes: entries stored as they are, found by their place in the file."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import BinaryIO

from edgeship.errors import SourceError

_LOCAL_HEADER = struct.Struct("<4s22xHH")


class Zipped:
    """The entries of a zip file, below the one folder that torch puts everything in.

    Numbers are not unpacked: torch compresses none, and a file that does could unpack to any size.
    """

    def __init__(self, file: BinaryIO, what: str, kind: str = "checkpoint", packed: str = "") -> None:
        """Reads the table of contents. Raises `SourceError` when the file is damaged, compressed, or encrypted.

        Args:
            what: names the file in errors. kind: what it should be. packed: a folder whose entries may be compressed.
        """
        self.file, self.what = file, what
        self.size = file.seek(0, io.SEEK_END)
        try:
            entries = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error) as error:
            raise SourceError(f"{what} is not a readable {kind}: {error}", fix="download it again") from None
        for entry in entries:
            stored = entry.compress_type == zipfile.ZIP_STORED
            allowed = (
                bool(packed) and f"/{packed}/" in f"/{entry.filename}" and entry.compress_type == zipfile.ZIP_DEFLATED
            )
            if not (stored or allowed) or entry.flag_bits & 1:
                raise SourceError(
                    f"{what} is compressed or encrypted inside: {entry.filename[:80]!r}", fix="save it again with torch"
                )
        roots = {entry.filename.partition("/")[0] for entry in entries}
        root = f"{roots.pop()}/" if len(roots) == 1 else ""
        self._entries = {entry.filename.removeprefix(root): entry for entry in entries if not entry.is_dir()}

    def names(self) -> list[str]:
        """Names of all entries, without the common folder."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def place(self, name: str) -> tuple[int, int]:
        """Where an entry's bytes begin in the file, and how many there are. Raises `SourceError`."""
        entry = self._entries.get(name)
        if entry is None:
            raise SourceError(f"{self.what} lacks {name[:80]!r}", fix="download it again")
        self.file.seek(entry.header_offset)
        head = self.file.read(_LOCAL_HEADER.size)
        if len(head) == _LOCAL_HEADER.size and head.startswith(b"PK\x03\x04"):
            _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(head)
            begin = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
            if begin + entry.compress_size <= self.size:
                return begin, entry.compress_size
        raise SourceError(f"{self.what} is cut short at {name[:80]!r}", fix="download it again")

    def read(self, name: str, most: int) -> bytes:
        """An entry's bytes. Raises `SourceError` when there are more than ``most``."""
        begin, size = self.place(name)
        entry = self._entries[name]
        if max(size, entry.file_size) > most:
            raise SourceError(
                f"{self.what}: {name[:80]!r} has {entry.file_size} bytes, {most} at most", fix="save it again"
            )
        self.file.seek(begin)
        content = self.file.read(size)
        if entry.compress_type == zipfile.ZIP_STORED:
            return content
        try:
            # What it says of its size may be wrong.
            unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, most + 1)
        except zlib.error as error:
            raise SourceError(f"{self.what} is damaged at {name[:80]!r}: {error}", fix="download it again") from None
        if len(unpacked) > most:
            raise SourceError(f"{self.what}: {name[:80]!r} has more than {most} bytes", fix="save it again")
        return unpacked
