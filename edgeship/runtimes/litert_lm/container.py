"""Find the sections of a ``.litertlm``, and check them before an engine trusts them."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from edgeship.errors import ArtifactError

# No header that this engine's files have is longer.
MAX_HEADER_BYTES = 1 << 20


@dataclass(frozen=True)
class Section:
    """Where one section lies: ``size`` bytes from ``start`` on."""

    kind: str
    start: int
    size: int


def read_sections(path: Path) -> dict[str, Section]:
    """The sections by kind, as the container's own schema names them.

    Raises:
        ArtifactError: missing, truncated or damaged; a kind that the engine needs is not there.
    """
    try:
        found = _read(path)
        missing = [kind for kind in ("LlmMetadataProto", "HF_Tokenizer_Zlib", "TFLiteModel") if kind not in found]
        if missing:
            raise ValueError(f"it has no section {missing[0]}")
        _check_metadata(read_content(path, found["LlmMetadataProto"]))
        _check_tokenizer(read_content(path, found["HF_Tokenizer_Zlib"]))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing", fix="build again") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}", fix="build again") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, struct.error) as error:
        raise ArtifactError(f"{path} is damaged: {error}", fix="build again") from None
    return found


def _read(path: Path) -> dict[str, Section]:
    from edgeship.compat.litert import section_reader, section_schema

    core, schema = section_reader(), section_schema()
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(core.HEADER_BEGIN_BYTE_OFFSET)
        if len(head) < core.HEADER_BEGIN_BYTE_OFFSET or head[:8] != core.HEADER_MAGIC_BYTES:
            raise ValueError("it is not a LiteRT-LM file")
        (end,) = struct.unpack_from("<Q", head, core.HEADER_END_LOCATION_BYTE_OFFSET)
        length = end - core.HEADER_BEGIN_BYTE_OFFSET
        if not 0 < length <= MAX_HEADER_BYTES or end > size:
            raise ValueError("its header ends outside of it")
        header = file.read(length)
    sections = schema.LiteRTLMMetaData.GetRootAs(header, 0).SectionMetadata()
    names = {number: name for name, number in vars(schema.AnySectionDataType).items() if isinstance(number, int)}
    found: dict[str, Section] = {}
    for index in range(sections.ObjectsLength()):
        entry = sections.Objects(index)
        start, stop = entry.BeginOffset(), entry.EndOffset()
        if not end <= start <= stop <= size:
            raise ValueError("a section lies outside of it")
        kind = names[entry.DataType()]
        if kind in found:
            raise ValueError(f"it has two sections {kind}")
        found[kind] = Section(kind, start, stop - start)
    return found


def read_content(path: Path, section: Section) -> bytes:
    """The bytes of a section."""
    with path.open("rb") as file:
        file.seek(section.start)
        return file.read(section.size)


def _check_metadata(content: bytes) -> None:
    from google.protobuf.message import DecodeError

    from edgeship.compat.litert import metadata_proto

    found = metadata_proto().LlmMetadata()
    try:
        found.ParseFromString(content)
    except DecodeError as error:
        raise ValueError(f"its metadata cannot be read: {error}") from None
    if not found.stop_tokens or found.max_num_tokens < 1:
        raise ValueError("its metadata lacks the context or the tokens that end a text")


def _check_tokenizer(content: bytes) -> None:
    try:
        text = zlib.decompress(content[8:])
    except zlib.error as error:
        raise ValueError(f"its tokenizer cannot be unpacked: {error}") from None
    if len(text) != int.from_bytes(content[:8], "little"):
        raise ValueError("its tokenizer is not as long as it says")
    json.loads(text)
