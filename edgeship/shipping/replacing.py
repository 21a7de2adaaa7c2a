"""What may be overwritten: a bundle is replaced only when every file in it is proved to be what edgeship wrote.

The proof is in the bundle: ``manifest.sha256`` is the digest of ``manifest.json``, which holds that of every other
file. What the manifest does not know, or knows otherwise, is somebody else's, and stays.

A new bundle is made in a draft, a folder of ours (`edgeship.core.owned`) beside the output: in ``bundle`` what is
written, in ``old`` what was replaced.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edgeship.core.artifact import MANIFEST, SEAL, file_digest, source_digest
from edgeship.core.owned import MARKER, Hold, alone_in, clear, hold, is_ours, make
from edgeship.errors import ChangedError, UsageError
from edgeship.shipping.swap import put_in_place

NEW, OLD = "bundle", "old"
# macOS leaves one in every folder that it shows. It is nobody's work, and moves over into the new bundle.
_DESKTOP_FILE, _DESKTOP_HEAD = ".DS_Store", b"\0\0\0\1Bud1"
_MAX_MANIFEST_BYTES = 1 << 30
_MAX_NAME_BYTES = 200
# Characters that `tempfile` adds to a name.
_RANDOM = 8


def recorded(place: Path) -> dict[str, str] | None:
    """Path -> SHA-256 of the files of a bundle, its manifest and seal left out; None when it proves to be none.

    Read leniently, so that bundles of other versions count; what a path that leaves the folder says is never used.
    """
    try:
        manifest, seal = place / MANIFEST, place / SEAL
        if manifest.is_symlink() or seal.is_symlink() or manifest.stat().st_size > _MAX_MANIFEST_BYTES:
            return None
        if seal.read_bytes() != f"{file_digest(manifest)}  {MANIFEST}\n".encode():
            return None
        plain = json.loads(manifest.read_text(encoding="utf-8"))
        files = [*plain["files"], *(file for artifact in plain["artifacts"] for file in artifact["files"])]
        if not isinstance(plain["edgeship"], str) or not isinstance(plain["schema_version"], int):
            return None
        return {str(file["path"]): str(file["sha256"]) for file in files}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


@dataclass(frozen=True)
class Holdings:
    """What lies in a bundle: paths of ours, of the desktop's, and, in words, what is neither."""

    ours: tuple[str, ...]
    desktop: tuple[str, ...]
    strange: tuple[str, ...]


def holdings(place: Path) -> Holdings | None:
    """Who wrote what in a folder; None when it is not a bundle of ours."""
    known = recorded(place)
    if known is None:
        return None
    folders = {parent.as_posix() for name in known for parent in Path(name).parents}
    ours, desktop, strange = [], [], []
    for path in _walk(place):
        name = path.relative_to(place).as_posix()
        if path.is_symlink():
            strange.append(f"{name}, a link, which edgeship did not make")
        elif path.is_dir():
            if name not in folders:
                strange.append(f"{name}, a folder, which edgeship did not make")
        elif name in (MANIFEST, SEAL):
            pass
        elif name not in known and is_of_desktop(path):
            desktop.append(name)
        elif name not in known:
            strange.append(f"{name}, which edgeship did not write")
        elif not path.is_file() or source_digest(path) != known[name]:
            strange.append(f"{name}, which was changed since edgeship wrote it")
        else:
            ours.append(name)
    return Holdings(tuple(ours), tuple(desktop), tuple(strange))


def is_of_desktop(path: Path) -> bool:
    """Whether a file is the one in which macOS keeps how it shows a folder."""
    if path.name != _DESKTOP_FILE or path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_DESKTOP_HEAD)) == _DESKTOP_HEAD


def _walk(folder: Path) -> Iterator[Path]:
    for item in sorted(os.scandir(folder), key=lambda entry: entry.name):
        yield Path(item.path)
        if item.is_dir(follow_symlinks=False):
            yield from _walk(Path(item.path))


def check_replaceable(place: Path, shown: Path) -> None:
    """Raise `UsageError`, naming what is in the way, unless ``place`` is empty, absent or a bundle of ours whole.

    Args:
        shown: what the user calls it.
    """
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise UsageError(f"{shown} is a file", fix="choose a folder with -o")
    if not any(place.iterdir()):
        return
    if is_ours(place):
        raise UsageError(f"{shown} is a folder of edgeship's cache", fix="choose another folder with -o")
    found = holdings(place)
    if found is None:
        raise UsageError(
            f"{shown} is not empty and not a bundle that edgeship wrote", fix="choose another folder with -o"
        )
    if found.strange:
        more = f" (and {len(found.strange) - 1} more)" if len(found.strange) > 1 else ""
        raise UsageError(
            f"{shown} holds {found.strange[0]}{more}; nothing was touched",
            fix="move it away, or choose another folder with -o",
        )


def remove_bundle(place: Path) -> bool:
    """Remove a bundle that nobody reaches by its name: files that are proved ours, and nothing else. Whether it is
    gone."""
    with suppress(OSError, ChangedError):
        found = holdings(place)
        if found is not None:
            for name in found.ours:
                (place / name).unlink()
            for path in sorted(_walk(place), reverse=True):
                if path.is_dir() and not path.is_symlink():
                    with suppress(OSError):
                        path.rmdir()
            if {item.name for item in place.iterdir()} == {MANIFEST, SEAL}:
                (place / MANIFEST).unlink()
                (place / SEAL).unlink()
        place.rmdir()
    return not os.path.lexists(place)


def check_place(output: Path, cache: Path | None = None, source: Path | None = None) -> None:
    """Refuse an output that cannot be replaced, whatever it holds.

    Args:
        cache: the folder of results. source: what is built from.

    Raises:
        UsageError: it holds the current folder, the source or the cache, lies in a bundle, or is a disk of its own.
    """
    place = resolved(output)
    if _here().is_relative_to(place):
        raise UsageError(f"{output} holds the current folder, and cannot be replaced", fix="choose a folder with -o")
    for what, path in (("the cache", cache), ("the source", source)):
        if path is not None and resolved(path).is_relative_to(place):
            raise UsageError(f"{output} holds {what}, {path}, and cannot be replaced", fix="choose a folder with -o")
    around = next((parent for parent in place.parents if recorded(parent) is not None), None)
    if around is not None:
        raise UsageError(f"{output} lies in the bundle {around}", fix="choose a folder beside it with -o")
    if _is_mounted(place):
        raise UsageError(f"{output} is a disk of its own, and cannot be replaced", fix="give a folder in it with -o")


def resolved(path: Path) -> Path:
    """The path without links. Raises `UsageError` where they lead in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{path} is not a path: {error}", fix="choose a folder with -o") from None


def _here() -> Path:
    try:
        return Path.cwd()
    except OSError:
        return Path("/nowhere")  # the current folder was removed


def _is_mounted(place: Path) -> bool:
    """Whether another disk, or another folder of the same one, is mounted here."""
    if os.path.ismount(place):
        return True
    with suppress(OSError):
        # Spaces and the like are written in octal there.
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        mounted = (line.split(" ")[4] for line in table.splitlines() if line.count(" ") > 4)
        return str(place) in {re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), name) for name in mounted}
    return False


class Draft:
    """A folder beside an output in which its new bundle is written."""

    def __init__(self, output: Path, kind: str = "draft") -> None:
        self.output = output
        self.folder, self._hold = make(output.parent, _prefix(output, kind))
        self.ready = self.folder / NEW

    def publish(self, shown: Path) -> None:
        """Put the bundle in place of what is there.

        Raises:
            UsageError: what is there is not ours, or not wholly so; it stays as it is.
        """
        old = self.folder / OLD

        def accept(place: Path) -> None:
            check_replaceable(place, shown)

        with alone_in(self.output.parent):
            check_place(self.output)
            accept(self.output)
            put_in_place(self.ready, self.output, old, accept)
            if old.is_dir():
                _keep_desktop_files(old, self.output)
                remove_bundle(old)

    def remove(self) -> None:
        """Remove the draft, with everything in it that is ours."""
        _remove_draft(self.folder, self._hold)


def _keep_desktop_files(old: Path, new: Path) -> None:
    found = holdings(old)
    for name in found.desktop if found else ():
        with suppress(OSError):
            if (new / name).parent.is_dir() and not os.path.lexists(new / name):
                (old / name).rename(new / name)
            else:
                (old / name).unlink()


@contextmanager
def drafted(output: Path, kind: str = "draft") -> Iterator[Draft]:
    """A draft that is removed at the end, whatever happens."""
    draft = Draft(output, kind)
    try:
        yield draft
    finally:
        draft.remove()


def _prefix(output: Path, kind: str) -> str:
    """How the drafts of an output are named; long names are cut, to leave room for the rest."""
    return f".{output.name.encode()[:_MAX_NAME_BYTES].decode(errors='ignore')}.{kind}-"


def remove_leftovers(output: Path) -> None:
    """Remove drafts of this bundle that killed builds left; a bundle that one had moved aside comes back."""
    with suppress(OSError):
        starts = _prefix(output, "draft"), _prefix(output, "probe")
        for name in os.listdir(output.parent):
            # Longer ones are of an output whose own name begins so.
            if not name.startswith(starts) or name[:-_RANDOM] not in starts:
                continue
            stale = output.parent / name
            held = hold(stale, alone=True)
            if held is None:
                continue
            if not os.path.lexists(output) and recorded(stale / OLD) is not None:
                (stale / OLD).rename(output)
            _remove_draft(stale, held)


def _remove_draft(folder: Path, held: Hold) -> None:
    """A bundle in it is removed by what its manifest proves; what was not finished is ours as the draft is."""
    new, old = folder / NEW, folder / OLD
    for place in (old, new):
        if place == old or os.path.lexists(place / SEAL):
            remove_bundle(place)
        with suppress(OSError, ValueError):
            # The end of a removal that was killed: only it leaves one of the two alone.
            (last,) = os.listdir(place)
            if last in (MANIFEST, SEAL):
                (place / last).unlink()
                place.rmdir()
    if set(os.listdir(folder)) <= {MARKER, NEW} and not os.path.lexists(new / SEAL):
        clear(folder)
    held.release()


def try_to_write(output: Path) -> None:
    """Make and remove a draft, to see that it can be done. Raises OSError."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with drafted(output, "probe"):
        pass
