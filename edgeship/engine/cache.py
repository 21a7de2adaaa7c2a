"""Content-addressed results: a step runs once for the same pass, options, inputs, code and tool versions.

One folder an entry, named by the full SHA-256 of its key; ``result.json`` in it is written last, and the folder is
renamed into place whole, so an entry either is complete or is not there. On a hit every file is checked against the
size and time it was stored with, and files that the step read outside its inputs (``dependencies.json``) against their
digests; an entry that fails is dropped and the step runs again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeship import __version__
from edgeship.core.artifact import file_digest, list_files, total_bytes
from edgeship.core.model import ARTIFACTS, Model, TorchModel
from edgeship.core.passes import Pass
from edgeship.core.processes import is_alive
from edgeship.core.records import from_plain, to_plain
from edgeship.core.registry import runtimes
from edgeship.core.report import Measurements, Verdict
from edgeship.core.units import parse_bytes
from edgeship.errors import EdgeshipError, OutputError

Result = Model | Verdict | Measurements
KINDS: dict[str, type[Any]] = {**ARTIFACTS, **{cls.kind: cls for cls in (TorchModel, Verdict, Measurements)}}
DEPENDENCIES = "dependencies.json"
RESULT = "result.json"
# How often to try when several builds store the same step at once.
ATTEMPTS = 20
# Entries beyond this are dropped, oldest use first.
DEFAULT_MAX_BYTES = 20 * 1000**3


@dataclass(frozen=True)
class Cache:
    """The folder of results. ``read`` False always runs steps again (their results still go in)."""

    root: Path
    read: bool = True

    def key(self, task: Pass, inputs: Mapping[str, str]) -> str:
        """The key of one step: pass, options, input digests, code, Python and tool versions; of the runtime that it
        runs too, where its ``runtime`` field names one."""
        named = runtimes().get(str(getattr(task, "runtime", "")))
        engines = [] if named is None else [named]
        made = {
            "pass": task.name,
            "options": to_plain(task),
            "inputs": dict(inputs),
            "edgeship": f"{__version__} {code_digest()}",
            "plugin": [_plugin_digest(type(item)) for item in (task, *engines)],
            "machine": [platform.node(), platform.processor(), os.cpu_count()] if task.local else [],
            "python": sys.version.split()[0],
            "tools": {tool: _version(tool) for tool in (*task.tools, *(name for e in engines for name in e.packages))},
        }
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Result | None:
        """The stored result, or None when there is none that holds."""
        folder = self.root / "steps" / key
        if not self.read or not (folder / RESULT).is_file():
            return None
        try:
            stored = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            if not _files_hold(folder, stored["files"]) or not _dependencies_hold(stored["dependencies"]):
                shutil.rmtree(folder, ignore_errors=True)
                return None
            result = _from_stored(folder, stored["result"])
            os.utime(folder)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, EdgeshipError):
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return result

    def scratch(self, key: str) -> Path:
        """A new empty folder for a running step, on the same file system as the entries."""
        folder = self.root / "running" / f"{key[:16]}-{os.getpid()}"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        except OSError as error:
            raise OutputError(
                f"the cache {self.root} cannot be written: {error.strerror}", fix="set EDGESHIP_CACHE to another folder"
            ) from None
        return folder

    def put(self, key: str, folder: Path, result: Result) -> Result:
        """Keep a result and the folder it was made in; returns the result as it reads from its final place."""
        files = {item.relative_to(folder).as_posix(): item for item in list_files(folder)}
        dependencies = {}
        if DEPENDENCIES in files:
            dependencies = json.loads(files.pop(DEPENDENCIES).read_text(encoding="utf-8"))
            (folder / DEPENDENCIES).unlink()
        digests = {name: file_digest(path) for name, path in files.items()}
        if isinstance(result, Model):
            signed = json.dumps([result.kind, to_plain(result.signature), digests], sort_keys=True)
            result = replace(result, digest=hashlib.sha256(signed.encode()).hexdigest())
        stored = {
            "result": _to_stored(folder, result),
            "files": {name: [path.stat().st_size, path.stat().st_mtime_ns] for name, path in files.items()},
            "dependencies": dependencies,
        }
        (folder / RESULT).write_text(json.dumps(stored), encoding="utf-8")
        final = self.root / "steps" / key
        final.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(ATTEMPTS):
            try:
                folder.rename(final)
                break
            except OSError:
                # Something is there: another build's entry, which is as good as ours, or one to be replaced.
                theirs = self.get(key)
                if theirs is not None or attempt == ATTEMPTS - 1:
                    shutil.rmtree(folder, ignore_errors=True)
                    if theirs is None:
                        raise
                    return theirs
                self._put_aside(final)
        return _from_stored(final, stored["result"])

    def _put_aside(self, final: Path) -> None:
        """Remove an entry in one step for whoever looks, and then from the disk."""
        aside = self.root / "running" / f"{final.name[:16]}-aside-{os.getpid()}"
        with suppress(OSError):
            final.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def sweep(self, max_bytes: int | None = None) -> None:
        """Drop what killed builds left, and the oldest entries beyond ``max_bytes``."""
        for folder in (self.root / "running").glob("*"):
            if not is_alive(folder.name.rpartition("-")[2]):
                shutil.rmtree(folder, ignore_errors=True)
        limit = max_bytes if max_bytes is not None else _max_bytes()
        entries = []
        for folder in (self.root / "steps").glob("*"):
            try:
                entries.append((folder.stat().st_mtime, total_bytes(folder), folder))
            except FileNotFoundError:
                continue  # another build replaced it while we looked
        total = sum(size for _, size, _ in entries)
        for _, size, folder in sorted(entries):
            if total <= limit:
                break
            shutil.rmtree(folder, ignore_errors=True)
            total -= size


def default_cache_root() -> Path:
    """``$EDGESHIP_CACHE``, or the user's cache folder."""
    from platformdirs import user_cache_path

    override = os.environ.get("EDGESHIP_CACHE")
    return Path(override) if override else user_cache_path("edgeship")


def _max_bytes() -> int:
    text = os.environ.get("EDGESHIP_CACHE_MAX", "")
    return parse_bytes(text) if text else DEFAULT_MAX_BYTES


@cache
def code_digest() -> str:
    """Digest over edgeship's own source files: changed code never meets an old result."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _plugin_digest(cls: type) -> str:
    """Digest over the code that a plug-in's class comes with: its whole package, or its one file."""
    if cls.__module__.startswith("edgeship."):
        return ""
    digest = hashlib.sha256()
    for path in _sources_of(cls.__module__):
        with suppress(OSError):
            digest.update(path.as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _sources_of(module: str) -> list[Path]:
    """The Python files of the outermost regular package that a module is in; of a lone module, its file."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        file = getattr(sys.modules.get(".".join(parts[:end])), "__file__", None)
        # Namespace packages, which others share, have no file.
        if file:
            path = Path(file)
            return sorted(path.parent.rglob("*.py")) if path.stem == "__init__" else [path]
    return []


@cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _files_hold(folder: Path, files: Mapping[str, list[int]]) -> bool:
    for name, (size, modified) in files.items():
        try:
            found = (folder / name).stat()
        except OSError:
            return False
        if (found.st_size, found.st_mtime_ns) != (size, modified):
            return False
    return True


def _dependencies_hold(dependencies: Mapping[str, str]) -> bool:
    return all(Path(path).is_file() and file_digest(Path(path)) == digest for path, digest in dependencies.items())


def _to_stored(folder: Path, result: Result) -> dict[str, Any]:
    plain: dict[str, Any] = to_plain(result)
    if isinstance(result, Model):
        plain["path"] = result.path.relative_to(folder).as_posix()
    return plain


def _from_stored(folder: Path, plain: dict[str, Any]) -> Result:
    cls = KINDS[plain["kind"]]
    result: Result = from_plain(cls, plain, RESULT)
    if isinstance(result, Model):
        result = replace(result, path=folder / result.path)
    return result
