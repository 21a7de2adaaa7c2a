"""Which of torch's formats a file has: by what it holds, and by its suffix where it is damaged."""

from __future__ import annotations

import struct
import tarfile
import zipfile
from pathlib import Path

from edgeship.errors import SourceError

#: Suffixes that trainers give to checkpoints; ``.pth.tar`` is one of them, and rarely a tar archive.
SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt", ".pkl", ".tar", ".jit", ".torchscript", ".ts")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def form_of_torch(path: Path, head: bytes) -> str:
    """``export``, ``torchscript`` or ``pickle``; empty for a file that is none of torch's.

    Args:
        head: the first bytes of the file.

    Raises:
        SourceError: a tar archive.
    """
    suffix = path.suffix.lower()
    names = _names(path) if head.startswith(_ZIP) else []
    if any(name.endswith("archive_format") for name in names):
        return "export"
    if any(name.endswith("/constants.pkl") for name in names):
        return "torchscript"
    if any(name.endswith("/data.pkl") for name in names):
        return "pickle"
    if suffix not in SUFFIXES:
        # Protocol 2 and later begin with their number, which is small.
        return "pickle" if head.startswith(_PICKLE) and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 2 else ""
    if suffix == ".tar" and not head.startswith(_PICKLE) and _is_tar(path):
        raise SourceError(f"{path} is a tar archive", fix="unpack it, and give the file inside")
    return "pickle"


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except OSError:
        return False


def _names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        return []
