"""Publish a bundle, read it, and verify it byte by byte."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeship.core.artifact import (
    INVENTORY,
    MANIFEST,
    READABLE_VERSIONS,
    REPORT,
    SCHEMA_VERSION,
    SEAL,
    TOKENIZER,
    ArtifactRecord,
    BuiltArtifact,
    Bundle,
    FileRecord,
    Gathered,
    Manifest,
    SourceRecord,
    copy_file,
    file_digest,
    list_files,
)
from edgeship.core.decoder import LanguageFacts
from edgeship.core.encodings import encoding_named
from edgeship.core.installed import is_installed
from edgeship.core.model import Artifact
from edgeship.core.owned import alone_in
from edgeship.core.records import read_json, to_plain, write_json
from edgeship.core.registry import runtimes
from edgeship.core.units import counted
from edgeship.errors import ArtifactError, ChangedError, OutputError, UsageError
from edgeship.shipping.plots import layer_bars, trade_off_curve
from edgeship.shipping.replacing import (
    check_place,
    check_replaceable,
    drafted,
    is_of_desktop,
    remove_leftovers,
    resolved,
    try_to_write,
)
from edgeship.version import __version__

# What helps where files are not what the manifest says.
REPLACED = "copy it again from where it was built, or move it away and build it again"
# Of an input or output of an artifact: 2 GB of the smallest numbers.
MAX_ELEMENTS, MAX_DIMENSIONS = 2**31, 32


def check_output(output: Path, cache: Path | None = None, source: Path | None = None) -> None:
    """Refuse, before any work, an output that could not be written or would overwrite something else.

    Args:
        cache: the folder of results. source: what is built from. Neither may lie in the output.

    Raises:
        OutputError: not writable. UsageError: a file, or a folder that is not a bundle of ours whole.
    """
    check_place(output, cache, source)
    place = resolved(output)
    try:
        try_to_write(place)
        with alone_in(place.parent):
            check_replaceable(place, output)
    except OSError as error:
        raise OutputError(
            f"{place.parent} cannot be written: {error.strerror}", fix="choose another folder with -o"
        ) from None


def publish(gathered: Gathered) -> Bundle:
    """Write the bundle beside its place, then put it there in one rename.

    Raises:
        ChangedError: a file of an artifact is no longer what the checks read. OutputError: no space, or no right to
            write. UsageError: meanwhile something that is not ours came to lie in its place.
    """
    output = resolved(gathered.output)
    remove_leftovers(output)
    try:
        with drafted(output) as draft:
            manifest = _write_bundle(draft.ready, gathered)
            draft.publish(gathered.output)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(f"no space left on the disk of {output}", fix="free some, or another -o") from error
        raise OutputError(f"{output} cannot be written: {error.strerror}", fix="choose another -o") from error
    return Bundle(gathered.output, manifest)


def _write_bundle(draft: Path, gathered: Gathered) -> Manifest:
    draft.mkdir()
    records = tuple(_write_artifact(draft, built, gathered) for built in gathered.built)
    write_json(draft / REPORT, replace(gathered.report, bundle=str(gathered.output)))
    write_json(draft / INVENTORY, gathered.inventory)
    shared = [_record(draft, draft / name) for name in (REPORT, INVENTORY, *_write_plots(draft, gathered))]
    if gathered.tokenizer is not None:
        shared += _copy_all(gathered.tokenizer, [gathered.tokenizer], draft / TOKENIZER, draft, gathered.digests)
    manifest = Manifest(
        SCHEMA_VERSION,
        __version__,
        SourceRecord(gathered.request.source.reference, gathered.request.source.form, gathered.source_digest),
        gathered.request.profile.name,
        records,
        gathered.plan.plain(),
        gathered.report.versions,
        tuple(shared),
    )
    write_json(draft / MANIFEST, manifest)
    (draft / SEAL).write_text(f"{file_digest(draft / MANIFEST)}  {MANIFEST}\n", encoding="utf-8")
    _flush(draft)
    return manifest


def _copy_all(
    origin: Path, sources: Sequence[Path], folder: Path, draft: Path, digests: Mapping[Path, str]
) -> list[FileRecord]:
    """Copy files, and all files of folders, from ``origin`` into a folder of the draft; each is hashed on its way."""
    records = []
    for file in dict.fromkeys(file for source in sources for file in list_files(source)):
        target = folder / file.relative_to(origin)
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = copy_file(file, target)
        if digests and digests.get(file) != digest:
            raise ChangedError(
                f"{file} is no longer what the checks read; nothing was published", fix="run the same command again"
            )
        records.append(FileRecord(target.relative_to(draft).as_posix(), digest, target.stat().st_size))
    return sorted(records, key=lambda record: record.path)


def artifact_folder(built: BuiltArtifact, all_built: Sequence[BuiltArtifact]) -> str:
    """The bundle-relative folder of one artifact: its runtime, with the targets added when two would share it."""
    same = [other for other in all_built if other.artifact.runtime == built.artifact.runtime]
    return built.artifact.runtime if len(same) == 1 else f"{built.artifact.runtime}-{'-'.join(built.targets)}"


def _write_artifact(draft: Path, built: BuiltArtifact, gathered: Gathered) -> ArtifactRecord:
    folder = draft / artifact_folder(built, gathered.built)
    folder.mkdir()
    artifact = built.artifact
    names = artifact.files or (artifact.path.name,)
    inside = artifact.path.is_dir() and all((artifact.path / name).exists() for name in names)
    origin = artifact.path if inside else artifact.path.parent
    files = _copy_all(origin, [origin / name for name in names], folder, draft, gathered.digests)
    main = folder / artifact.path.relative_to(origin)
    row = next(
        row for row in gathered.report.rows if row.runtime == artifact.runtime and row.target == ",".join(built.targets)
    )
    verdict = next(item for item in row.verdicts if item.check == "check/verify")
    return ArtifactRecord(
        runtime=artifact.runtime,
        targets=built.targets,
        model_kind=artifact.kind,
        main=main.relative_to(draft).as_posix(),
        files=tuple(files),
        signature=artifact.signature,
        compute=artifact.compute,
        choice=built.choice,
        encodings=built.encodings,
        activations=built.activations,
        memory_bytes=row.memory_bytes,
        verified=verdict.summary,
        reproducible=artifact.facts.get("nondeterministic", ""),
        facts=artifact.facts,
        language=artifact.language,
        weight_bytes=built.weight_bytes,
        bits_per_weight=built.bits_per_weight,
    )


def _write_plots(draft: Path, gathered: Gathered) -> list[str]:
    """``layers-NAME.svg``: the error of each layer; ``trade-off-NAME.svg`` where bits were allocated."""
    names = []
    for built in gathered.built:
        name = artifact_folder(built, gathered.built)
        rows = [
            (layer, 10 ** (-item.snr_db / 20), f"{item.encoding}, {item.snr_db:.1f} dB")
            for layer, item in built.encodings.items()
            if item.snr_db is not None
        ]
        if rows:
            title = f"{name}: error of each stored weight, relative to its float values"
            (draft / f"layers-{name}.svg").write_text(layer_bars(title, rows), encoding="utf-8")
            names.append(f"layers-{name}.svg")
        if built.curve:
            size = sum(item.bytes for item in built.encodings.values())
            chosen = min(built.curve, key=lambda point: abs(point[0] - size))
            title = f"{name}: noise over signal of the best choice of encodings, over bytes of weights"
            text = trade_off_curve(title, built.curve, chosen)
            (draft / f"trade-off-{name}.svg").write_text(text, encoding="utf-8")
            names.append(f"trade-off-{name}.svg")
    return names


def _record(root: Path, path: Path) -> FileRecord:
    return FileRecord(path.relative_to(root).as_posix(), file_digest(path), path.stat().st_size)


def _flush(folder: Path) -> None:
    """Ask the disk to hold every file before the rename makes them visible."""
    for path in list_files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_record(path: Path, record: ArtifactRecord) -> None:
    """Raise `ArtifactError` for an artifact that nothing here opens, or whose inputs are no tensors."""
    known = runtimes().get(record.runtime)
    if known is None or record.model_kind != known.artifact.kind:
        raise ArtifactError(
            f"{path}: {record.main[:80]} is for the runtime {record.runtime[:40]!r}, which is not here",
            fix="install its plug-in, or build it again",
        )
    for spec in (*record.signature.inputs, *record.signature.outputs):
        if len(spec.shape) > MAX_DIMENSIONS or any(size < 0 for size in spec.shape):
            raise ArtifactError(f"{path}: {spec.name[:80]} has no shape that a tensor has", fix="build it again")
        if math.prod(spec.shape) > MAX_ELEMENTS:
            raise ArtifactError(f"{path}: {str(spec)[:80]} is larger than any input", fix="build it again")


def _refuse_unknown_encodings(path: Path) -> None:
    """Raise `ArtifactError` for an encoding that a package brings which is not here; all else is for the reader."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        choices = [item["choice"] for item in manifest["artifacts"]]
        names = [name for choice in choices for name in (choice.get("weights"), choice.get("embeddings")) if name]
        versions = {str(name): str(version) for name, version in manifest["versions"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return
    for name in filter(lambda name: isinstance(name, str) and name != "auto", names):
        try:
            encoding_named(name)
        except UsageError:
            lacking = [f"{item} {version}" for item, version in versions.items() if not is_installed(item)]
            from_where = f"install {', '.join(lacking)}, which it was built with" if lacking else ""
            raise ArtifactError(
                f"{path}: weights are stored as {name[:40]}, an encoding that nothing here knows",
                fix=from_where or "install the package that brings the encoding",
            ) from None


def read_bundle(path: Path) -> Bundle:
    """Read a bundle's manifest and check it against the published schema. Raises `ArtifactError`."""
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a bundle", fix="give the folder that edgeship build wrote")
    if not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path} holds no {MANIFEST}", fix="give the folder that edgeship build wrote")
    _refuse_unknown_encodings(path)
    manifest = read_json(Manifest, path / MANIFEST)
    if manifest.schema_version not in READABLE_VERSIONS:
        shown = " and ".join(map(str, READABLE_VERSIONS))
        raise ArtifactError(
            f"{path} has manifest version {manifest.schema_version}, this edgeship reads {shown}",
            fix="build it again",
        )
    for record in manifest.artifacts:
        _check_record(path, record)
    return Bundle(path, replace(manifest, artifacts=tuple(map(_with_language, manifest.artifacts))))


def _with_language(record: ArtifactRecord) -> ArtifactRecord:
    """A record of an older bundle with what its facts say of a language model. Raises `ArtifactError`."""
    if record.language is not None or not runtimes()[record.runtime].engine.for_language:
        return record
    return replace(record, language=LanguageFacts.of_texts(record.facts))


def check_whole(bundle: Bundle) -> None:
    """Raise `ArtifactError` with the first of `changed_files`."""
    problems = changed_files(bundle)
    if problems:
        raise ArtifactError(f"{bundle.path}: {told_of(problems)}", fix=REPLACED)


def check_there(bundle: Bundle, records: Sequence[ArtifactRecord]) -> None:
    """Raise `ArtifactError` when a file of some artifacts is missing or has another size; nothing is read."""
    for file in (file for record in records for file in record.files):
        path = bundle.path / file.path
        if not path.is_file():
            raise ArtifactError(f"{bundle.path}: {file.path} is missing", fix=REPLACED)
        if path.stat().st_size != file.bytes:
            size = path.stat().st_size
            raise ArtifactError(f"{bundle.path}: {file.path} has {size} bytes, {file.bytes} recorded", fix=REPLACED)


def told_of(problems: Sequence[str]) -> str:
    """The first of several problems, and how many more there are."""
    more = f", and {counted(len(problems) - 1, 'more problem')}" if len(problems) > 1 else ""
    return f"{problems[0]}{more}"


def changed_files(bundle: Bundle) -> list[str]:
    """One sentence for each file that is missing, changed, added, or recorded outside the bundle; empty when whole."""
    problems = []
    records = [file for artifact in bundle.manifest.artifacts for file in artifact.files] + list(bundle.manifest.files)
    known = {MANIFEST, SEAL}
    seal = bundle.path / SEAL
    expected = f"{file_digest(bundle.path / MANIFEST)}  {MANIFEST}\n"
    if not seal.is_file() or seal.read_bytes() != expected.encode():
        problems.append(f"{MANIFEST} does not match {SEAL}")
    for record in records:
        known.add(record.path)
        path = bundle.path / record.path
        if ".." in Path(record.path).parts or Path(record.path).is_absolute():
            problems.append(f"{record.path} points outside the bundle")
        elif not path.is_file():
            problems.append(f"{record.path} is missing")
        elif path.stat().st_size != record.bytes:
            problems.append(f"{record.path} has {path.stat().st_size} bytes, {record.bytes} recorded")
        elif file_digest(path) != record.sha256:
            problems.append(f"{record.path} has changed")
    for artifact in bundle.manifest.artifacts:
        if not any(Path(file.path).is_relative_to(artifact.main) for file in artifact.files):
            problems.append(f"{artifact.main} is none of the files of its artifact")
    folders = {parent.as_posix() for name in known for parent in Path(name).parents}
    for path in sorted(bundle.path.rglob("*")):
        name = path.relative_to(bundle.path).as_posix()
        if path.is_symlink() or (name not in (folders if path.is_dir() else known) and not is_of_desktop(path)):
            problems.append(f"{name} is {'a link' if path.is_symlink() else 'not in the manifest'}")
    return problems


def schema_problem(path: Path) -> str:
    """Why ``manifest.json`` does not meet the published schema; empty when it does."""
    import jsonschema

    schema = json.loads(schema_path().read_text(encoding="utf-8"))
    data = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    errors = sorted(jsonschema.Draft202012Validator(schema).iter_errors(data), key=lambda error: list(error.path))
    return f"{'/'.join(map(str, errors[0].path)) or 'manifest'}: {errors[0].message}" if errors else ""


def schema_path() -> Path:
    """Where the published JSON Schema of the manifest lies."""
    return Path(__file__).resolve().parents[1] / "schemas" / "manifest.schema.json"


def opened(bundle: Bundle, record: ArtifactRecord) -> Artifact:
    """The model handle of one artifact in a bundle, as `Runtime.open` takes it."""
    cls = runtimes()[record.runtime].artifact
    values: dict[str, Any] = {
        "path": bundle.path / record.main,
        "signature": record.signature,
        "files": tuple(file.path for file in record.files),
        "placements": tuple(item.placement for item in record.encodings.values()),
        "compute": record.compute,
        "facts": record.facts,
        "language": record.language,
    }
    return cls(**values)


def manifest_plain(bundle: Bundle) -> dict[str, Any]:
    """A manifest as JSON-ready data."""
    plain: dict[str, Any] = to_plain(bundle.manifest)
    return plain
