"""The bundle: the folder that ships, its manifest, and the digests that prove it whole."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgeship.core.choice import Choice
from edgeship.core.decoder import LanguageFacts
from edgeship.core.inventory import Inventory
from edgeship.core.model import Artifact, Placement, Signature
from edgeship.core.plan import Plan
from edgeship.core.profile import Request
from edgeship.core.report import Report
from edgeship.errors import ChangedError

MANIFEST = "manifest.json"
REPORT = "report.json"
INVENTORY = "inventory.json"
# The manifest holds every other file's digest; this file holds the manifest's, in the form that sha256sum -c reads.
SEAL = "manifest.sha256"
# Of a language model: its tokenizer, configuration and chat template.
TOKENIZER = "tokenizer"
# In a folder for onnxruntime-genai: where adapters lie, and how their files end.
ADAPTERS, ADAPTER_SUFFIX = "adapters", ".onnx_adapter"
SCHEMA_VERSION = 2
# Of bundles that are still read: version 1 has no `ArtifactRecord.language`, but says the same among its facts.
READABLE_VERSIONS = (1, 2)
_BLOCK = 1 << 20
# Digests by device, inode, size and times of what was hashed in this process.
_known: dict[tuple[int, ...], str] = {}
_MAX_KNOWN = 100_000
_READS = 3
# The coarsest clock of a file system that is still met (FAT), and some more.
_TICK_NS = 3_000_000_000


@dataclass(frozen=True)
class FileRecord:
    """One shipped file: path relative to the bundle, SHA-256 in hex, size in bytes."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class EncodingRecord:
    """How one weight is stored: the encoding in words, its bits, and where the artifact keeps it.

    Args:
        bytes: in the file, with scales, tables and mask. snr_db: of the stored weight to its float values; None when
            they are equal. loss: noise over signal at the model's outputs with this weight alone stored so, where it
            was measured.
    """

    encoding: str
    bits: int
    shape: tuple[int, ...]
    placement: Placement
    bytes: int = 0
    snr_db: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class ArtifactRecord:
    """One artifact of the manifest.

    Args:
        model_kind: class of the model handle, which says what opens it. main: the file or folder to open.
        compute: arithmetic. reproducible: empty when building twice gives the same bytes, else the reason why not.
        encodings: by weight name; weights not named are stored in ``compute`` precision.
        choice: what the profile wanted for this runtime, in words.
        activations: static integers by graph node: [bits, scale, zero point].
        weight_bytes: of all weights, encoded and not. bits_per_weight: the same over all scalars.
        facts: session options an app must set, versions, counts. language: of a language model.
    """

    runtime: str
    targets: tuple[str, ...]
    model_kind: str
    main: str
    files: tuple[FileRecord, ...]
    signature: Signature
    compute: str
    choice: Choice
    encodings: dict[str, EncodingRecord]
    activations: dict[str, tuple[int, float, int]]
    memory_bytes: int
    verified: str
    reproducible: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    weight_bytes: int = 0
    bits_per_weight: float = 0.0
    language: LanguageFacts | None = field(default=None, metadata={"since": 2})


@dataclass(frozen=True)
class SourceRecord:
    """What the bundle was made from."""

    reference: str
    form: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: what is in a bundle. Its JSON Schema ships as ``edgeship/schemas/manifest.schema.json``."""

    schema_version: int
    edgeship: str
    source: SourceRecord
    profile: str
    artifacts: tuple[ArtifactRecord, ...]
    plan: dict[str, object]
    versions: dict[str, str]
    files: tuple[FileRecord, ...] = ()


@dataclass(frozen=True)
class BuiltArtifact:
    """One artifact of a running build, with what the steps said about it; ``curve`` is the trade-off it was chosen
    from."""

    targets: tuple[str, ...]
    artifact: Artifact
    choice: Choice
    encodings: dict[str, EncodingRecord]
    activations: dict[str, tuple[int, float, int]]
    weight_bytes: int = 0
    bits_per_weight: float = 0.0
    curve: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Gathered:
    """Everything a build made, for passes that end it (package; later an HTML report).

    Args:
        digests: SHA-256 of every file that may be published, as the checks read it, by its absolute path.
    """

    output: Path
    request: Request
    plan: Plan
    built: tuple[BuiltArtifact, ...]
    report: Report
    inventory: Inventory
    source_digest: str
    tokenizer: Path | None = None
    digests: Mapping[Path, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    """A published bundle."""

    path: Path
    manifest: Manifest


def source_digest(path: Path) -> str:
    """`file_digest` of a file that may change: read once as long as nothing about its inode does.

    Not for bundles: a byte changed behind the system's back must show there.

    Raises:
        ChangedError: the file changed each time that it was read.
    """
    for _ in range(_READS):
        before = path.stat()
        key = (before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
        if key in _known:
            return _known[key]
        started = time.time_ns()
        digest = file_digest(path)
        after = path.stat()
        if key == (after.st_dev, after.st_ino, after.st_size, after.st_mtime_ns, after.st_ctime_ns):
            # A clock ticks in steps: one that changed just now may change again without a newer time. Where the disk's
            # clock runs ahead of ours it never seems old, and is read each time.
            if started - before.st_ctime_ns > _TICK_NS:
                if len(_known) >= _MAX_KNOWN:
                    _known.clear()
                _known[key] = digest
            return digest
    raise ChangedError(f"{path} changes while it is read", fix="wait until it is written, and run the command again")


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hex, read by blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def copy_file(source: Path, target: Path) -> str:
    """Write the bytes of a file to a new one; returns the SHA-256, in hex, of the bytes that were written."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("xb") as written:
        while block := read.read(_BLOCK):
            digest.update(block)
            written.write(block)
    return digest.hexdigest()


def script_digest(reference: str) -> str:
    """`file_digest` of the file of ``path/to/file.py:function``; empty when there is no such file."""
    script = Path(reference.rpartition(":")[0])
    return file_digest(script) if script.is_file() else ""


def list_files(folder: Path) -> list[Path]:
    """Every file below a folder, sorted by relative path. A single file lists itself."""
    if folder.is_file():
        return [folder]
    return sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.as_posix())


def total_bytes(path: Path) -> int:
    """Bytes of a file, or of everything below a folder."""
    return sum(item.stat().st_size for item in list_files(path))
