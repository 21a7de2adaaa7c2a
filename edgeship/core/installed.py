"""What edgeship asks of other packages, beside what is installed: ranges, what exists for this system, what was tested.

The ranges are those of edgeship's own metadata (``pyproject.toml``). The versions that its tests ran with are in
``constraints/*.txt``, which the wheel carries.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

# The extra that lists those for users; the others are for work on edgeship itself.
EVERYTHING = "all"


# (package, its versions, another one, its versions, the way out): they do not load beside each other, and the metadata
# of neither says so.
CLASHES = (("torchao", ">=0.18", "torch", "<2.10", 'pip install "torchao<0.18"'),)


@dataclass(frozen=True)
class Wanted:
    """One distribution that edgeship asks for.

    Args:
        extra: of edgeship, that brings it; empty for what is always needed.
        versions: the range, as in ``torch>=2.9,<2.15``; empty when any will do.
        offered: whether it is published for this system and Python at all.
        installed: the version that is there; empty when there is none.
        tested: the versions that edgeship's tests ran with, oldest first.
    """

    name: str
    extra: str
    versions: str
    offered: bool
    installed: str
    tested: tuple[str, ...] = ()


def wanted() -> tuple[Wanted, ...]:
    """Everything that users may need, in the order of edgeship's metadata; empty where edgeship is not installed."""
    try:
        lines = metadata.requires("edgeship") or []
    except metadata.PackageNotFoundError:
        return ()
    return read_requirements(lines, tested_versions())


def read_requirements(lines: Iterable[str], tested: Mapping[str, tuple[str, ...]]) -> tuple[Wanted, ...]:
    """The requirements of a distribution's metadata.

    Args:
        lines: as ``Requires-Dist`` has them: ``coremltools<9.1,>=9.0; extra == "coreml"``.
        tested: normalised name -> versions.
    """
    members: dict[str, list[Requirement]] = {}
    for item in map(Requirement, lines):
        members.setdefault(_extra(item), []).append(item)
    sizes = _sizes_for_users(members)
    found: dict[str, Wanted] = {}
    # An extra that holds another one repeats what that one brings: the smallest says it.
    for extra in sorted(sizes, key=lambda name: (sizes[name], name)):
        for item in members[extra]:
            name = canonicalize_name(item.name)
            if name not in found and name != "edgeship":
                offered = _applies(item, extra)
                known = tested.get(name, ())
                found[name] = Wanted(item.name, extra, str(item.specifier), offered, _installed(name), known)
    return tuple(found.values())


def _sizes_for_users(members: Mapping[str, Iterable[Requirement]]) -> dict[str, int]:
    """The extras that are part of `EVERYTHING`, and how many distributions each brings; 0 for what is always needed.

    Build backends differ: some leave an extra's mention of other extras as it is, some write out what it brings.
    """
    brought = {extra: _brought(extra, members) for extra in members}
    everything = brought.get(EVERYTHING, set())
    sizes = {extra: len(names) for extra, names in brought.items() if names <= everything and extra != EVERYTHING}
    return {**sizes, "": 0}


def _brought(extra: str, members: Mapping[str, Iterable[Requirement]]) -> set[str]:
    names: set[str] = set()
    for item in members.get(extra, ()):
        if item.name == "edgeship":
            names.update(*(_brought(other, members) for other in item.extras))
        else:
            names.add(canonicalize_name(item.name))
    return names


def remarks(found: Iterable[Wanted]) -> list[str]:
    """What to know about what is installed, a line each: versions that were not tested, and what is missing."""
    lines = []
    missing: dict[str, list[str]] = {}
    for item in found:
        if not item.installed:
            if item.offered:
                missing.setdefault(item.extra, []).append(item.name)
            else:
                lines.append(f"{item.extra}: {not_offered(item.name)}")
        elif not _contains(item.versions, item.installed):
            fix = f'pip install "{item.name}{item.versions}"'
            lines.append(f"{item.name} {item.installed} is outside of what edgeship takes ({item.versions}); {fix}")
        elif item.tested and item.installed.partition("+")[0] not in item.tested:
            lines.append(f"{item.name} {item.installed} was not tested; tested: {', '.join(item.tested)}")
    for extra, names in missing.items():
        package = f"edgeship[{extra}]" if extra else "edgeship"
        lines.append(f'not installed: {", ".join(names)}; pip install "{package}"')
    return lines


def clashes() -> list[str]:
    """Installed packages of `CLASHES` that do not load beside each other, a line each."""
    lines = []
    for name, versions, other, others, fix in CLASHES:
        here, there = _installed(name), _installed(other)
        if here and there and _contains(versions, here) and _contains(others, there):
            lines.append(f"{name} {here} does not load beside {other} {there}; {fix}")
    return lines


def not_offered(name: str) -> str:
    """Why a distribution cannot be had here; empty when it can, or when edgeship does not ask for it."""
    for item in wanted():
        if canonicalize_name(item.name) == canonicalize_name(name) and not item.offered:
            return f"{item.name} is not published for {system()}"
    return ""


def is_installed(name: str) -> bool:
    """Whether a distribution is there, in whatever version."""
    return bool(_installed(name))


def system() -> str:
    """This operating system and processor, in words: ``macOS arm64``."""
    name = "macOS" if sys.platform == "darwin" else platform.system()
    return f"{name} {platform.machine()}"


@cache
def tested_versions() -> dict[str, tuple[str, ...]]:
    """Normalised name of a distribution -> the versions that the tests ran with, oldest first."""
    package = Path(__file__).resolve().parents[1]
    places = [folder for folder in (package / "constraints", package.parent / "constraints") if folder.is_dir()]
    found: dict[str, set[str]] = {}
    for path in sorted(places[0].glob("*.txt")) if places else ():
        for name, version in read_constraints(path).items():
            found.setdefault(name, set()).add(version)
    return {name: tuple(sorted(versions, key=Version)) for name, versions in found.items()}


def read_constraints(path: Path) -> dict[str, str]:
    """Normalised name -> version of a file of exact constraints (``name==version`` lines; ``#`` starts a comment)."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, equal, version = line.partition("#")[0].strip().partition("==")
        if equal:
            found[canonicalize_name(name)] = version
    return found


def _contains(versions: str, version: str) -> bool:
    try:
        return SpecifierSet(versions).contains(version, prereleases=True)
    except InvalidVersion:
        return False


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _applies(item: Requirement, extra: str) -> bool:
    here = {"sys_platform": sys.platform, "platform_machine": platform.machine(), "platform_system": platform.system()}
    return item.marker is None or item.marker.evaluate({**here, "extra": extra})


def _extra(item: Requirement) -> str:
    """The extra that a requirement belongs to, by what its marker asks; empty when it belongs to none."""
    text = str(item.marker or "")
    return text.partition('extra == "')[2].partition('"')[0]
