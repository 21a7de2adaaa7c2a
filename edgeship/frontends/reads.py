"""Record which files a user's function reads, so that a cached result is dropped when one of them changes."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeship.core.artifact import source_digest
from edgeship.core.stamps import Stamp, moved, stamp
from edgeship.errors import ChangedError


class Reads:
    """Files read while recording: opened by Python, imported from outside the installation, or by safetensors.

    Each is stamped before it is opened: what changed since then may be read half old and half new.
    """

    def __init__(self) -> None:
        self.paths: dict[Path, Stamp] = {}
        self.written: set[Path] = set()

    def saw(self, path: Any) -> None:
        """Note one path when it is a file of the user's."""
        if not isinstance(path, (str, bytes, Path)):
            return
        found = Path(path.decode(errors="replace") if isinstance(path, bytes) else path)
        if found.suffix in (".pyc", ".so", ".dylib") or found.parts[:2] in (("/", "proc"), ("/", "sys"), ("/", "dev")):
            return
        if found.absolute() not in self.paths:
            self.paths[found.absolute()] = stamp(found)

    def digests(self) -> dict[str, str]:
        """Path -> SHA-256 of every file seen that still exists and belongs to no installed package.

        Called when everything has been read. Raises `ChangedError` when somebody else changed one since it was opened.
        """
        installed = [Path(sysconfig.get_path("stdlib")), *map(Path, site.getsitepackages()), Path(sys.base_prefix)]
        installed.append(Path(__file__).resolve().parents[1])
        own: list[Path] = []
        for path in self.paths:
            if path.is_file() and not any(path.is_relative_to(folder) for folder in installed):
                own.append(path)
        digests = {str(path): source_digest(path) for path in sorted(own)}
        changed = moved({path: self.paths[path] for path in own if path not in self.written})
        if changed is not None:
            raise ChangedError(f"{changed} changed while it was read", fix="run the same command again")
        return digests


@contextmanager
def recorded_reads() -> Iterator[Reads]:
    """Record reads inside the block: by this process, in whichever thread."""
    from edgeship.compat import python, safetensors

    reads = Reads()
    before = set(sys.modules)

    def opened(path: Any, writing: bool) -> None:
        if not writing:
            reads.saw(path)
        elif isinstance(path, (str, bytes, Path)):
            reads.written.add(Path(os.fsdecode(path)).absolute())

    try:
        # safetensors opens files in Rust, where no audit event is raised.
        with python.opened_files(opened), safetensors.opened_files(reads.saw):
            yield reads
    finally:
        for name in set(sys.modules) - before:
            path = getattr(sys.modules.get(name), "__file__", None)
            if path:
                reads.saw(path)
