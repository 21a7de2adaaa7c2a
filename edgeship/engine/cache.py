"""Content-addressed results: a step runs once for the same pass, options, inputs, code and tool versions.

One folder an entry, named by the full SHA-256 of its key. It is a folder of ours (`edgeship.core.owned`), renamed into
place whole, so an entry either is complete or is not there. ``result.json`` in it holds the SHA-256 of every file, and
its own.

On a hit every file is hashed, and files that the step read outside its inputs too; an entry that is not what was stored
is dropped and the step runs again. A build holds a lock on each entry that it uses, and nobody removes it meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeship.core.artifact import list_files, source_digest, total_bytes
from edgeship.core.encodings import families
from edgeship.core.model import KeptFiles, Model, Signature, Source
from edgeship.core.owned import MARKER, Hold, claim, clear, hold, is_ours, make, remove
from edgeship.core.passes import Pass
from edgeship.core.records import from_plain, to_plain
from edgeship.core.registry import kinds, runtimes
from edgeship.core.report import Measurements, Verdict
from edgeship.core.units import parse_bytes
from edgeship.errors import ChangedError, EdgeshipError, OutputError
from edgeship.version import __version__

Result = Model | Verdict | Measurements
DEPENDENCIES = "dependencies.json"
RESULT = "result.json"
# In a folder of a running step: what the step writes.
WORK = "work"
# How the name of a folder begins that steps of one build share.
COMMON = "common"
# How often to try when several builds store the same step at once.
ATTEMPTS = 20
# Entries beyond this are dropped, oldest use first.
DEFAULT_MAX_BYTES = 20 * 1000**3


@dataclass(frozen=True)
class Cache:
    """The folder of results.

    Args:
        read: False always runs steps again; their results still go in. held: locks on what this build uses, by folder.
    """

    root: Path
    read: bool = True
    held: dict[Path, Hold] = field(default_factory=dict, compare=False, repr=False)

    def key(self, task: Pass, inputs: Mapping[str, str]) -> str:
        """The key of one step: pass, options, input digests, code, Python and tool versions; of the runtime that it
        runs too, where its ``runtime`` field names one."""
        named = runtimes().get(str(getattr(task, "runtime", "")))
        engines = [] if named is None else [named]
        tools = [*task.tools]
        for engine in engines:
            tools += engine.packages
        made = {
            "pass": task.name,
            "options": to_plain(task),
            "inputs": dict(inputs),
            "edgeship": f"{__version__} {code_digest()}",
            "plugin": [_plugin_digest(cls) for cls in (type(task), *map(type, engines), *_added_families())],
            "machine": [platform.node(), platform.processor(), os.cpu_count()] if task.local else [],
            "python": sys.version.split()[0],
            "tools": {tool: _version(tool) for tool in tools},
        }
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()

    def windows(self, made_of: Mapping[str, Any], make: Callable[[Path], Path]) -> Path:
        """A text as windows of tokens: the file that is here already, or that ``make`` writes into a folder.

        Args:
            made_of: everything that decides it, besides our code and the tokenizer's.
        """
        code = [__version__, code_digest(), sys.version.split()[0], _version("tokenizers"), _version("numpy")]
        key = hashlib.sha256(json.dumps([dict(made_of), code], sort_keys=True).encode()).hexdigest()
        found = self.get(key)
        if found is None:
            folder = self.scratch(key)
            try:
                found = self.put(key, folder, KeptFiles(make(folder), Signature((), ())))
            finally:
                self.discard(folder)
        assert isinstance(found, KeptFiles)
        return found.path

    def kept(self, make: Callable[[Path], Path]) -> Path:
        """What ``make`` writes into a folder, kept under the digest of its content: equal content is there once."""
        folder = self.scratch("given")
        try:
            path = make(folder)
            names = {item.relative_to(folder).as_posix(): source_digest(item) for item in list_files(folder)}
            key = hashlib.sha256(json.dumps(["kept", names], sort_keys=True).encode()).hexdigest()
            found = self.put(key, folder, KeptFiles(path, Signature((), ())))
        finally:
            self.discard(folder)
        assert isinstance(found, KeptFiles)
        return found.path

    def get(self, key: str) -> Result | None:
        """The stored result, held until `close`, or None when there is none that holds."""
        folder = self.root / "steps" / key
        if not self.read or not (folder / RESULT).is_file():
            return None
        held = _hold(folder) or (_hold(folder) if _mend(folder) else None)
        if held is None:
            return None  # it is just being removed, or no entry of ours
        stored = _read_stored(folder)
        try:
            if stored is not None and _files_hold(folder, stored["files"]):
                if not _dependencies_hold(stored["dependencies"]):
                    held.release()
                    _remove_entry(folder)
                    return None
                result = _from_stored(folder, stored["result"])
                with suppress(OSError):
                    os.utime(folder)
                self.held[folder] = held
                return result
        except (OSError, ValueError, LookupError, TypeError, AttributeError, EdgeshipError):
            pass
        held.release()
        self._drop_damaged(folder)
        return None

    def scratch(self, key: str) -> Path:
        """A new empty folder for a running step, on the same file system as the entries. End it with `put` or
        `discard`."""
        running = self.root / "running"
        try:
            running.mkdir(parents=True, exist_ok=True)
            place, held = make(running, f"{key[:16]}-")
            self.held[place] = held
            folder = place / WORK
            folder.mkdir()
        except OSError as error:
            raise OutputError(
                f"the cache {self.root} cannot be written: {error.strerror}", fix="set EDGESHIP_CACHE to another folder"
            ) from None
        return folder

    def common(self) -> Path:
        """A new folder for what steps of a build leave for each other, until `close`."""
        folder = self.scratch(COMMON)
        self.held[folder] = claim(folder, alone=True)
        return folder

    def discard(self, folder: Path) -> None:
        """Remove what is left of a `scratch`, unless its result is still in use there."""
        place = folder.parent
        if folder not in self.held and place in self.held:
            clear(place)
            self.held.pop(place).release()

    def put(self, key: str, folder: Path, result: Result) -> Result:
        """Keep a result and the folder it was made in; returns the result as it reads from its final place.

        Where the entry of this key is in use and may not be read, or is not ours, the result stays where it was made
        until `close`.
        """
        files = {item.relative_to(folder).as_posix(): item for item in list_files(folder)}
        dependencies = {}
        if DEPENDENCIES in files:
            dependencies = json.loads(files.pop(DEPENDENCIES).read_text(encoding="utf-8"))
            (folder / DEPENDENCIES).unlink()
        digests = {name: source_digest(path) for name, path in files.items()}
        if isinstance(result, Model):
            signed = json.dumps([result.kind, to_plain(result.signature), digests], sort_keys=True)
            result = replace(result, digest=hashlib.sha256(signed.encode()).hexdigest())
        stored = {"result": _to_stored(folder, result), "files": digests, "dependencies": dependencies}
        _write_stored(folder, stored)
        held = claim(folder, alone=False)
        final = self.root / "steps" / key
        final.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(ATTEMPTS):
            try:
                folder.rename(final)
            except OSError:
                # Something is there: another build's entry, which is as good as ours, or one to be replaced.
                theirs = self.get(key)
                if theirs is not None:
                    held.release()
                    clear(folder)
                    self.discard(folder)
                    return theirs
                if not _remove_entry(final) and attempt == ATTEMPTS - 1:
                    self.held[folder] = held
                    return _from_stored(folder, stored["result"])
                time.sleep(0.002)
                continue
            self.held[final] = held
            self.discard(folder)
            break
        return _from_stored(final, stored["result"])

    def check(self, model: Model) -> None:
        """Raise `ChangedError`, and drop the entry, when a model in the cache is no longer what was stored."""
        # A source is looked at by what it holds (`engine.outside`), wherever it lies.
        folder = None if isinstance(model, Source) else _entry_of(model.path)
        if folder is None:
            return
        stored = _read_stored(folder)
        if stored is None or stored["result"].get("digest") != model.digest or not _files_hold(folder, stored["files"]):
            self._drop_damaged(folder)
            raise ChangedError(
                f"{folder} in the cache changed while the build used it", fix="run the same command again"
            )

    def digests(self, model: Model) -> dict[Path, str]:
        """SHA-256 of every file of the entry that a model lies in, as it was stored, by absolute path."""
        folder = _entry_of(model.path)
        stored = None if folder is None else _read_stored(folder)
        if folder is None or stored is None:
            raise ChangedError(f"{model.path} is no longer in the cache", fix="run the same command again")
        return {folder / name: digest for name, digest in stored["files"].items()}

    def close(self) -> None:
        """Let go of the entries in use; results that found no place are removed."""
        for held in self.held.values():
            held.release()
        for folder in self.held:
            if folder.name == WORK:
                remove(folder)
                with suppress(OSError):
                    folder.rmdir()
                remove(folder.parent)
        self.held.clear()

    def _drop_damaged(self, folder: Path) -> None:
        """Take an entry away from whoever uses it: nobody should. What is not ours in it stays, aside."""
        self.held.pop(folder, None)
        if _remove_entry(folder) or not is_ours(folder):
            return
        with suppress(OSError):
            running = self.root / "running"
            running.mkdir(parents=True, exist_ok=True)
            place, held = make(running, "damaged-")
            folder.rename(place / WORK)
            if not _strangers(place / WORK):
                clear(place)
            held.release()

    def sweep(self, max_bytes: int | None = None) -> None:
        """Drop what killed builds left, and the oldest entries beyond ``max_bytes`` that no build uses."""
        for folder in _folders(self.root / "running"):
            if not is_ours(folder / WORK) or not _strangers(folder / WORK):
                remove(folder)
        limit = max_bytes if max_bytes is not None else _max_bytes()
        entries = []
        for folder in _folders(self.root / "steps"):
            if is_ours(folder) or _mend(folder):
                with suppress(FileNotFoundError):  # another build replaced it while we looked
                    entries.append((folder.stat().st_mtime, total_bytes(folder), folder))
        total = sum(size for _, size, _ in entries)
        for _, size, folder in sorted(entries):
            if total <= limit:
                break
            if _remove_entry(folder):
                total -= size


def _folders(parent: Path) -> list[Path]:
    try:
        return [Path(item.path) for item in os.scandir(parent) if item.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _hold(folder: Path) -> Hold | None:
    """Use an entry together with others. Whoever holds it alone is about to remove it, or looks whether he may."""
    for _ in range(ATTEMPTS):
        held = hold(folder, alone=False)
        if held is not None or not is_ours(folder):
            return held
        time.sleep(0.01)
    return None


def _mend(folder: Path) -> bool:
    """Write the marker of an entry anew when it is damaged: the record with its own digest proves that it is ours."""
    if is_ours(folder) or folder.is_symlink() or _read_stored(folder) is None:
        return False
    with suppress(OSError):
        (folder / MARKER).unlink(missing_ok=True)
        claim(folder, alone=False).release()
        return True
    return False


def _remove_entry(folder: Path) -> bool:
    """Remove an entry of ours that nobody uses and that holds nothing else. Whether it is gone."""
    held = hold(folder, alone=True)
    if held is None:
        return not os.path.lexists(folder)
    try:
        return not _strangers(folder) and clear(folder)
    finally:
        held.release()


def _strangers(folder: Path) -> list[str]:
    """Files in an entry that were not stored with it, as far as what it says of itself can be read."""
    try:
        known = json.loads((folder / RESULT).read_text(encoding="utf-8"))["stored"]["files"]
        found = [item.relative_to(folder).as_posix() for item in folder.rglob("*") if not item.is_dir()]
        return [name for name in found if name not in known and name not in (RESULT, MARKER)]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _entry_of(path: Path) -> Path | None:
    """The entry that a file lies in."""
    return next((place for place in (path, *path.parents) if (place / RESULT).is_file() and is_ours(place)), None)


def _write_stored(folder: Path, stored: Mapping[str, Any]) -> None:
    text = json.dumps(stored, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / RESULT).write_text(f'{{"sha256": "{digest}", "stored": {text}}}', encoding="utf-8")


def _read_stored(folder: Path) -> dict[str, Any] | None:
    """What an entry says of itself; None when that is not what was written."""
    try:
        plain = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        stored: dict[str, Any] = plain["stored"]
        text = json.dumps(stored, sort_keys=True)
        whole = plain["sha256"] == hashlib.sha256(text.encode()).hexdigest()
        return stored if whole and stored.keys() == {"result", "files", "dependencies"} else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def result_kinds() -> dict[str, type[Result]]:
    """What a step can end in, and the cache can read, by kind."""
    return {**kinds(), Verdict.kind: Verdict, Measurements.kind: Measurements}


def logs_folder() -> Path:
    """Where logs go that belong to no bundle."""
    return default_cache_root() / "logs"


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


def _added_families() -> list[type]:
    """Families of encodings of other packages: any step may round, store or read a weight by what they say."""
    return [family for family in families().values() if not family.__module__.startswith("edgeship.")]


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


def _files_hold(folder: Path, files: Mapping[str, str]) -> bool:
    """Whether every file has the content that it was stored with."""
    for name, digest in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or source_digest(path) != digest:
            return False
    return True


def _dependencies_hold(dependencies: Mapping[str, str]) -> bool:
    return all(Path(path).is_file() and source_digest(Path(path)) == digest for path, digest in dependencies.items())


def _to_stored(folder: Path, result: Result) -> dict[str, Any]:
    plain: dict[str, Any] = to_plain(result)
    if isinstance(result, Model):
        plain["path"] = result.path.relative_to(folder).as_posix()
    return plain


def _from_stored(folder: Path, plain: dict[str, Any]) -> Result:
    result = from_plain(result_kinds()[plain["kind"]], plain, RESULT)
    if isinstance(result, Model):
        result = replace(result, path=folder / result.path)
    return result
