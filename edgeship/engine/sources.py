"""Tell what the user named apart by what it is: a sample folder, a factory, a file of a known format, a folder."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeship.core.artifact import SEAL, file_digest, list_files, source_digest
from edgeship.core.model import Signature, Source
from edgeship.core.names import clean_name
from edgeship.core.owned import is_ours
from edgeship.core.records import read_toml, suggest
from edgeship.core.renames import parse_output_renames
from edgeship.data.specs import check_name, parse_renames
from edgeship.engine.chatter import is_log
from edgeship.engine.torch_files import form_of_torch
from edgeship.errors import EdgeshipError, SourceError, UnsafeSourceError, UsageError
from edgeship.frontends.llama2c import is_checkpoint

SAMPLE_FILE = "sample.toml"
# Of a note on an input: float32 holds it, and its inverse.
MOST = 1e30


@dataclass(frozen=True)
class InputNotes:
    """What a sample says about one input besides its shape; ``name`` is what artifacts call it."""

    layout: str | None = None
    low: float | None = None
    high: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        numbers = (*(self.mean or ()), *(self.std or ()), *(x for x in (self.low, self.high) if x is not None))
        if not all(math.isfinite(number) and abs(number) < MOST for number in numbers):
            raise UsageError(
                "low, high, mean and std must be numbers that float32 holds", fix="leave out what is unknown"
            )
        if self.std is not None and min(self.std, default=0.0) < 1 / MOST:
            raise UsageError(f"std {list(self.std)} divides by nothing", fix="give a number above 0 a channel")
        if self.mean is not None and not self.mean:
            raise UsageError("mean is empty", fix="give one number a channel, or leave it out")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise UsageError(f"{len(self.mean)} means for {len(self.std)} deviations", fix="give one of each a channel")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise UsageError(f"low {self.low:g} is above high {self.high:g}", fix="swap them")


@dataclass(frozen=True)
class Sample:
    """``sample.toml``: a model with its inputs and data, so that a folder can be built by its name alone.

    Args:
        source: as on the command line, seen from the folder; ``.`` is the folder itself. factory: of a file of weights.
        calibration, evaluation, metric: as on the command line; files are looked for in the folder.
        cut: values or modules at which the model ends, as with ``--cut``.
        input: what is known of each input, by name.
    """

    source: str
    factory: str | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    calibration: str | None = None
    evaluation: str | None = None
    metric: str | None = None
    input: dict[str, InputNotes] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """A source and what came with it: loader options, and data that a sample brings."""

    source: Source
    load: dict[str, Any]
    calibration: str | None = None
    evaluation: str | None = None
    metric: str | None = None


def find_source(
    reference: str,
    *,
    inputs: tuple[str, ...] = (),
    outputs: tuple[str, ...] = (),
    factory: str | None = None,
    renames: tuple[str, ...] = (),
    cut: tuple[str, ...] = (),
    trust: bool = False,
) -> Found:
    """What ``reference`` is. Nothing is loaded or run.

    Python that the command line names is the user's own. Python that a file in a folder names may have been downloaded
    with it, and is taken with ``trust`` alone; so are files outside of the folder.

    Args:
        renames: names for inputs, each ``OLD=NEW``. cut: where the model ends instead of at its outputs.

    Raises:
        SourceError: it does not exist, or is of no known form. UsageError: options that do not belong to its form.
        UnsafeSourceError: a sample names Python of its own, or leaves its folder, and ``trust`` is off.
    """
    renamed = parse_renames(renames)
    try:
        found = _find(reference, inputs, outputs, factory, trust)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no path"
        raise SourceError(f"{reference[:200]!r} cannot be read: {reason}", fix="check the path") from None
    found.load["cut"] = cut or found.load["cut"]
    check_names(found.load["outputs"])
    notes: dict[str, dict[str, Any]] = found.load["notes"]
    for note in notes.values():
        if note.get("name"):
            check_name("the name of an input in sample.toml", note["name"], clean_name(note["name"], "input"))
    for old, new in renamed.items():
        notes[old] = {**notes.get(old, {}), "name": new}
    return found


def check_names(outputs: Sequence[str]) -> None:
    """Refuse names for outputs that some runtime does not take."""
    renamed = any("=" in text for text in outputs)
    for name in parse_output_renames(outputs).values() if renamed else outputs:
        check_name("--output-name", name, clean_name(name, "output"))


def _find(reference: str, inputs: tuple[str, ...], outputs: tuple[str, ...], factory: str | None, trust: bool) -> Found:
    load: dict[str, Any] = {
        "inputs": inputs, "outputs": outputs, "factory": factory, "notes": {}, "trusted": trust, "cut": ()
    }  # fmt: skip
    path = Path(reference)
    if not reference:
        raise SourceError("the source is empty and does not exist", fix=_KNOWN)
    if path.is_dir() and (path / SAMPLE_FILE).is_file():
        return _from_sample(path, load)
    if _is_factory(reference):
        head = reference.rpartition(":")[0]
        if factory:
            raise UsageError("--factory belongs to a weights file; this source is a factory", fix="leave it out")
        if head.endswith(".py") and not Path(head).is_file():
            raise SourceError(f"{head} does not exist", fix=_nearby(Path(head)))
        return Found(_source(path, "torch", reference), load)
    if not path.exists():
        raise SourceError(f"{reference} does not exist", fix=_nearby(path))
    form = _form(path)
    if form == "huggingface" and not inputs and _writes_text(path):
        form = "decoder"
    if form in ("safetensors", "pickle") and not factory:
        raise _without_model(path, form, reference)
    if form not in ("safetensors", "pickle") and factory:
        raise UsageError(f"--factory belongs to a weights file; {reference} is {form}", fix="leave it out")
    return Found(_source(path, form, reference, factory or ""), load)


def _without_model(path: Path, form: str, reference: str) -> SourceError:
    """What to say of a file of weights that comes without the code of its model."""
    from edgeship.frontends.state_dicts import whole_module

    kind = whole_module(path) if form == "pickle" else ""
    if kind:
        return SourceError(
            f"{reference} is a pickled module, {kind}: its code is not in the file, and loading it would run code",
            fix="add --factory file.py:function, which makes the module; its weights are taken from the file",
        )
    what = "safetensors" if form == "safetensors" else "a pickle of weights"
    return SourceError(f"{reference} is {what}: weights without a model", fix="add --factory file.py:function")


def _form(path: Path) -> str:
    if path.is_dir():
        if (path / "config.json").is_file():
            return "huggingface"
        raise SourceError(f"{path} is a folder without config.json or {SAMPLE_FILE}", fix=_KNOWN)
    if not path.is_file():
        raise SourceError(f"{path} is neither a file nor a folder", fix=_KNOWN)
    with path.open("rb") as file:
        head = file.read(16)
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return "onnx"
    if suffix == ".pt2":
        return "export"
    if suffix == ".safetensors":
        return "safetensors"
    if suffix == ".bin" and is_checkpoint(path):
        return "llama2c"
    torch_form = form_of_torch(path, head)
    if torch_form:
        return torch_form
    if suffix == ".py":
        raise SourceError(f"{path} is a Python file", fix=f"name the function that returns the model: {path}:model")
    if head[:4] in (b"TFL3",) or head[4:8] == b"TFL3":
        raise SourceError(f"{path} is a TFLite file, which is an output of edgeship", fix="give the model it came from")
    raise SourceError(f"the format of {path} is not known", fix=_KNOWN)


def _writes_text(folder: Path) -> bool:
    """Whether ``config.json`` names a language model that writes text. One with inputs given is a plain network."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = [str(name) for name in config.get("architectures") or ()]
    except (OSError, ValueError, AttributeError, TypeError):
        return False  # the loader says what is wrong with it
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


_KNOWN = (
    "give file.py:function, package.module:function, a .pt2, a TorchScript archive, a Hugging Face folder, an .onnx, "
    "a llama2.c .bin, or a file of weights with --factory"
)


def _from_sample(folder: Path, load: dict[str, Any]) -> Found:
    sample = read_toml(Sample, folder / SAMPLE_FILE)
    if not (load["trusted"] or _is_own_sample(folder)):
        _refuse_code(folder, sample)
    load["inputs"] = load["inputs"] or sample.inputs
    load["outputs"] = load["outputs"] or sample.outputs
    load["cut"] = sample.cut
    load["notes"] = {name: vars(notes) for name, notes in sample.input.items()}

    def beside(name: str | None) -> str | None:
        return None if name is None else str(folder / name)

    load["factory"] = load["factory"] or beside(sample.factory)
    inner = folder / sample.source
    if inner.is_dir() and inner.resolve() == folder.resolve():
        if load["factory"]:
            raise UsageError(f"{folder}: a factory belongs to a file of weights", fix="name the file as source")
        form = "decoder" if not load["inputs"] and _writes_text(folder) else "huggingface"
        source = _source(folder, form, str(folder))
    elif inner.is_dir() and (inner / SAMPLE_FILE).is_file():
        raise UsageError(f"{folder / SAMPLE_FILE} names another sample, {sample.source!r}", fix="give that folder")
    else:
        source = find_source(str(inner), factory=load["factory"]).source
    metric = beside(sample.metric) if sample.metric and _is_factory(sample.metric) else sample.metric
    return Found(source, load, beside(sample.calibration), beside(sample.evaluation), metric)


def _is_own_sample(folder: Path) -> bool:
    """Whether a folder is one of the samples of the checkout that edgeship itself runs from."""
    samples = Path(__file__).resolve().parents[2] / "samples"
    return folder.resolve().parent == samples and (samples.parent / "pyproject.toml").is_file()


def code_in_sample(folder: Path, sample: Sample) -> list[str]:
    """Python that a sample names, as it names it: factories, functions that make data, metrics. Files that are not
    there cannot run, and are reported as missing where they are needed."""
    named = [sample.source, sample.factory, sample.calibration, sample.evaluation]
    if sample.metric and _is_factory(sample.metric):
        named.append(sample.metric)
    found = []
    for name in filter(None, named):
        if not _is_factory(name) and not _is_factory(str(folder / name)):
            continue
        head, _, _ = name.rpartition(":")
        if not head.endswith(".py") or (folder / head).is_file():
            found.append(name)
    return found


def _refuse_code(folder: Path, sample: Sample) -> None:
    """Raise `UnsafeSourceError` for Python that the sample names, and for files outside of its folder."""
    code = code_in_sample(folder, sample)
    if code:
        raise UnsafeSourceError(
            f"{folder / SAMPLE_FILE} names Python that would run: {', '.join(code)[:200]}",
            fix="read it, and add --trust to let it run",
        )
    home = folder.resolve()
    files = [name for name in (sample.source, sample.factory, sample.calibration, sample.evaluation) if name]
    outside = next((name for name in files if not (folder / name).resolve().is_relative_to(home)), None)
    if outside is not None:
        raise UnsafeSourceError(
            f"{folder / SAMPLE_FILE} leads out of its folder, to {outside[:200]}", fix="add --trust to let it"
        )


def trusted_code(reference: str) -> list[str]:
    """What ``--trust`` lets run for a source, for people to read: nothing where it changes nothing."""
    path = Path(reference)
    try:
        if path.is_dir() and (path / SAMPLE_FILE).is_file():
            return code_in_sample(path, read_toml(Sample, path / SAMPLE_FILE))
        if path.is_file() and _form(path) == "export":
            from edgeship.program.archive import code_in_archive

            return code_in_archive(path)
    except (OSError, EdgeshipError):
        pass  # building says what is wrong with it
    return []


def _source(path: Path, form: str, reference: str, factory: str = "") -> Source:
    search = tuple(str(Path(entry).absolute()) for entry in sys.path)
    source = Source(path, Signature((), ()), form=form, reference=reference, factory=factory, search=search)
    return replace(source, digest=source_state(source)[0])


def source_state(source: Source) -> tuple[str, list[Path]]:
    """The digest of what the user named as it is now, and the files that it is over."""
    if source.form == "torch":
        return _factory_digest(source.reference, source.search), _scripts(source.reference)
    files = _files(source.path)
    digest = _digest(files, source.path)
    if source.factory:
        digest = hashlib.sha256(f"{digest} {_factory_digest(source.factory, source.search)}".encode()).hexdigest()
        files = [*files, *_scripts(source.factory)]
    return digest, files


def _scripts(reference: str) -> list[Path]:
    file = Path(reference.rpartition(":")[0])
    return [file] if file.suffix == ".py" and file.is_file() else []


def _is_factory(reference: str) -> bool:
    head, colon, tail = reference.rpartition(":")
    return bool(colon) and tail.isidentifier() and len(head) > 1 and not Path(reference).exists()


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return [item for item in list_files(path) if not item.name.startswith(".") and not _is_made(item, path)]
    if path.suffix == ".bin":
        return [path, *sorted(item for item in path.parent.glob("tok*.bin") if item != path)]
    # External data of ONNX lies beside the file under names only the file knows: take likely ones.
    beside = [item for item in path.parent.glob(f"{path.stem}*") if item.is_file() and item.suffix in (".data", ".bin")]
    return [path, *sorted(item for item in beside if item != path)]


def _is_made(file: Path, root: Path) -> bool:
    """Whether a file in the source's folder is what edgeship itself puts there while it builds: a bundle, a draft of
    one, the cache, or a log. It is not part of the source, and would make it another one each time."""
    between = [place for place in file.parents if place.is_relative_to(root) and place != root]
    if any(is_ours(place) or (place / SEAL).is_file() for place in between):
        return True
    return file.suffix == ".log" and is_log(file)


def _digest(files: list[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for item in files:
        name = item.relative_to(root).as_posix() if root.is_dir() else item.name
        digest.update(name.encode() + b"\0" + source_digest(item).encode())
    return digest.hexdigest()


def _factory_digest(reference: str, search: Sequence[str]) -> str:
    """The function's file and where it lies: what it imports and reads beside itself is another model elsewhere."""
    head = reference.rpartition(":")[0]
    file = Path(head)
    if head.endswith(".py") and file.is_file():
        places = [str(file.resolve()), file_digest(file)]
    else:
        places = list(search)
    return hashlib.sha256("\0".join([reference, *places]).encode()).hexdigest()


def _nearby(path: Path) -> str:
    parent = path.parent if str(path.parent) else Path(".")
    if not parent.is_dir():
        return f"{parent} does not exist either"
    return (
        suggest(path.name, [item.name for item in parent.iterdir()][:50]) if any(parent.iterdir()) else "check the path"
    )
