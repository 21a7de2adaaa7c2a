"""What a user may order: one record, made from the words of the command line and from arguments in Python alike."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack, get_args

from edgeship.api.given_models import GivenModel, is_in_memory, take_model
from edgeship.core.decoder import CacheType
from edgeship.core.encodings import encoding_named
from edgeship.core.forms import ActivationMode
from edgeship.core.records import suggest
from edgeship.core.settings import Options, Settings, collect
from edgeship.core.units import parse_bytes, parse_fraction
from edgeship.data.memory import GivenData, take_data
from edgeship.data.specs import spec_texts
from edgeship.errors import UsageError

T = TypeVar("T")
# Several in one text are separated by commas, as on the command line.
Names = str | Sequence[str]
Place = str | os.PathLike[str]
MOST_JOBS = 64


class Said(TypedDict, total=False):
    """What can be said of a build besides the model and its inputs. Each name is the command line's option.

    ``target`` and ``targets`` are the same, so are ``runtime`` and ``runtimes``: one name, several in a list, or
    several in one text with commas.

    Keys:
        profile: what to aim for, or a TOML file of your own. weights: an encoding in place of the profile's, such as
            ``int8``, ``int4-g32``, ``float16``. activations: ``float``, ``int8``, ``int16`` or ``dynamic``.
        passes: options of passes, ``[Quantize(method="gptq")]``. options: the same by name.
        calibration, eval: data (`edgeship.data.memory`): arrays, tensors, dicts of them, a DataLoader, or a path.
        max_size: bytes, or a text such as ``"3MB"``. max_drop: a fraction, or ``"1%"``.
        input_names: ``{"old": "new"}``. output_names: the same, or one for each output in order.
        cut: values (of an ONNX file) or modules at which the model ends instead of at its outputs.
        adapters: ``{"name": folder}``. tokenizer: of a language model that is given as an object.
        weights_key: which set of weights of a checkpoint, where several fit the factory's module.
        output: the bundle's folder; ``<name>.edgeship`` here when left out. cache: False runs every step again.
        jobs: how many runtimes are lowered and checked at once; by cores and memory when left out.
    """

    target: Names
    targets: Names
    runtime: Names
    runtimes: Names
    profile: Place
    weights: str
    activations: ActivationMode
    passes: Sequence[Settings]
    options: Options
    calibration: Any
    eval: Any
    metric: str
    max_size: int | str
    max_drop: float | str
    keep: Names
    context: int
    kv_cache: CacheType
    part: str
    lora: Place
    adapters: Mapping[str, Place] | Sequence[str]
    input_names: Mapping[str, str] | Sequence[str]
    output_names: Names | Mapping[str, str]
    cut: Names
    factory: str
    weights_key: str
    tokenizer: Any
    output: Place
    cache: bool
    jobs: int
    trust: bool
    all_or_nothing: bool


@dataclass(frozen=True)
class BuildOrder:
    """Everything a user can say to ``build`` and ``plan``.

    Args:
        source: factory, file or folder; what to call a ``model`` that lies in memory.
        targets: names. runtimes: names; empty means each target's own list.
        renames: names for inputs, each ``OLD=NEW``. cut: where the model ends instead of at its outputs.
        output: bundle folder; ``<name>.edgeship`` here when None. options: ``{"compress/quantize": {"bits": 8}}``.
        weights_key: which set of weights in a checkpoint. weights, activations: in place of the profile's.
        metric: see `edgeship.data.metrics`; accuracy when None.
        context: positions that a language model's artifacts keep. lora: folder of a PEFT adapter to merge.
        part: ``encoder`` or ``decoder`` of an encoder-decoder; the whole network when None.
        kv_cache: how a language model's artifacts keep keys and values; each engine's own way when None.
        adapters: PEFT adapters that ship beside a language model, each as ``NAME=DIR``.
        keep: weights that keep more bits than the profile has, each as ``PATTERN`` or ``PATTERN=ENCODING``.
        max_drop: fraction. max_size_bytes: limit for each artifact's files.
        trust: run code that comes with the source: Python that its sample.toml names, pickles in a .pt2.
        all_or_nothing: publish nothing unless every runtime takes the model and every check holds.
        jobs: how many artifacts are made at once, each in a process; by cores and memory when None, 1 in this one.
    """

    source: str
    targets: tuple[str, ...]
    runtimes: tuple[str, ...] = ()
    profile: str = "balanced"
    output: Path | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    renames: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    factory: str | None = None
    weights_key: str | None = None
    weights: str | None = None
    activations: ActivationMode | None = None
    calibration: str | GivenData | None = None
    evaluation: str | GivenData | None = None
    metric: str | None = None
    max_size_bytes: int | None = None
    max_drop: float | None = None
    context: int | None = None
    kv_cache: CacheType | None = None
    lora: str | None = None
    part: str | None = None
    adapters: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    use_cache: bool = True
    trust: bool = False
    all_or_nothing: bool = False
    jobs: int | None = None
    model: GivenModel | None = None

    @property
    def bundle(self) -> Path:
        """Where the bundle goes."""
        if self.output is not None:
            return self.output if self.output.name not in ("", "..") else self.output.resolve()
        head, _, function = self.source.rpartition(":")
        name = Path(head or self.source).resolve().stem if head and function.isidentifier() else ""
        return Path(f"{name or Path(self.source).resolve().stem}.edgeship")

    @property
    def named_file(self) -> Path | None:
        """The file or folder of the source, where it names one."""
        if self.model is not None:
            return None
        head, _, function = self.source.rpartition(":")
        names = [self.source, head] if function.isidentifier() else [self.source]
        return next((Path(name) for name in names if name and Path(name).exists()), None)


def make_order(model: Any, inputs: Any = None, **said: Unpack[Said]) -> BuildOrder:
    """An order from a model, its inputs, and what else was said.

    Args:
        model: a factory (``file.py:function``), a file, a folder, or a model in memory (`api.given_models`).
        inputs: specifications (``"image:f32[1,3,224,224]"``) or example arrays; one, several, or a dict by name.

    Raises:
        UsageError: a name nobody knows, a value of another form, or two values for one thing.
    """
    strange = [name for name in said if name not in Said.__annotations__]
    if strange:
        own = strange[0] in ("progress", "log")
        raise UsageError(
            f"{strange[0]} is for build alone" if own else f"there is no argument {strange[0]}",
            fix="leave it out" if own else suggest(strange[0], Said.__annotations__),
        )
    _refuse_empty(said)
    _refuse_kinds(said)
    given = is_in_memory(model)
    tokenizer = said.get("tokenizer")
    if tokenizer is not None and not given:
        raise UsageError("tokenizer belongs to a model in memory; a folder has its own", fix="leave it out")
    held = take_model(model, inputs, tokenizer) if given else None
    return BuildOrder(
        source=held.title if held is not None else _source(model),
        model=held,
        # Of a model in memory the inputs may be tensors, which it keeps itself.
        inputs=() if held is not None else spec_texts(inputs),
        targets=_either(said, "target", "targets"),
        runtimes=_either(said, "runtime", "runtimes"),
        profile=_path(said.get("profile")) or "balanced",
        output=_folder(said.get("output")),
        outputs=_pairs("output_names", said.get("output_names")),
        renames=_pairs("input_names", said.get("input_names")),
        cut=_names("cut", said.get("cut")),
        factory=said.get("factory"),
        weights_key=said.get("weights_key"),
        weights=_weights(said.get("weights")),
        activations=_one_of("activations", said.get("activations"), get_args(ActivationMode)),
        calibration=take_data("calibration", said.get("calibration")),
        evaluation=take_data("eval", said.get("eval")),
        metric=_metric(said.get("metric")),
        max_size_bytes=_bytes(said.get("max_size")),
        max_drop=_fraction(said.get("max_drop")),
        context=_whole("context", said.get("context")),
        kv_cache=_one_of("kv_cache", said.get("kv_cache"), get_args(CacheType)),
        lora=_path(said.get("lora")),
        part=_one_of("part", said.get("part"), ("encoder", "decoder")),
        adapters=_pairs("adapters", said.get("adapters")),
        keep=_names("keep", said.get("keep")),
        options=collect(_listed(said.get("passes")), said.get("options") or {}),
        use_cache=said.get("cache", True),
        trust=said.get("trust", False),
        all_or_nothing=said.get("all_or_nothing", False),
        jobs=_jobs(said.get("jobs")),
    )


# What an argument may be that is no name, model or data; "no" would count as true, and a number would fail deep inside.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("trust", "all_or_nothing", "cache"), ((bool,), "True or False")),
    "max_size": ((Real, str), 'bytes, or text such as "3GB"'),
    "max_drop": ((Real, str), 'a share such as 0.01, or text such as "1%"'),
    **dict.fromkeys(("input_names", "adapters"), ((Mapping, str, list, tuple), 'a dict such as {"old": "new"}')),
    "weights_key": ((str,), 'a text such as "model_ema"'),
    "options": ((Mapping,), 'a dict such as {"compress/quantize": {"bits": 4}}'),
    "passes": ((Settings, list, tuple), "a list such as [edgeship.Quantize(bits=4)]"),
}


def _refuse_kinds(said: Said) -> None:
    """Raise `UsageError` for a value of a type that says nothing here."""
    for name, (kinds, wanted) in _KINDS.items():
        value = said.get(name)
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise UsageError(f"{name} takes {wanted}, not {value!r}", fix="write it so")


def _refuse_empty(said: Said) -> None:
    """Raise `UsageError` for a text that holds nothing: a variable of a shell that is not set, most likely."""
    for name, value in said.items():
        if isinstance(value, str) and not value.strip(" ,"):
            raise UsageError(f"{option(name)} is empty", fix="leave it out, or give it a value")


def option(name: str) -> str:
    """How the command line writes an argument: ``--max-size`` for ``max_size``."""
    singular = {"input_names": "input-name", "output_names": "output-name", "adapters": "adapter"}
    return "--" + singular.get(name, name.removesuffix("s") if name in ("targets", "runtimes") else name).replace(
        "_", "-"
    )


def _source(model: Any) -> str:
    if isinstance(model, (str, os.PathLike)):
        return os.fspath(model) if isinstance(os.fspath(model), str) else os.fsdecode(model)
    if isinstance(model, type):
        raise UsageError(f"{model.__name__} is a class, not a model", fix=f"give one of it: {model.__name__}(...)")
    raise UsageError(
        f"{type(model).__name__} is not a model",
        fix="give an nn.Module, an ExportedProgram, a transformers model, or a path",
    )


def _either(said: Said, one: str, many: str) -> tuple[str, ...]:
    """Names under the singular or the plural of an argument; not under both."""
    given = {name: said[name] for name in (one, many) if said.get(name) is not None}  # type: ignore[literal-required]
    if len(given) > 1:
        raise UsageError(f"{one} and {many} are the same", fix="give one of them")
    found = [_names(name, value) for name, value in given.items()]
    return found[0] if found else ()


def _names(name: str, value: Names | None) -> tuple[str, ...]:
    """One name, several with commas between, or a list of either."""
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable) or not all(isinstance(t, str) for t in texts):
        raise UsageError(
            f"{option(name)} takes a name or a list of names, not {value!r}", fix='write "a" or ["a", "b"]'
        )
    # Names of inputs and outputs and patterns of weights may hold a comma; those of targets and runtimes do not.
    if name in ("output_names", "cut", "keep", "input_names", "adapters"):
        return tuple(text.strip() for text in texts)
    parts = [part.strip() for text in texts for part in text.split(",")]
    return tuple(filter(None, parts))


def _pairs(name: str, value: Mapping[str, Any] | Sequence[str] | None) -> tuple[str, ...]:
    """A mapping as ``OLD=NEW``; texts of that form stay as they are."""
    if isinstance(value, Mapping):
        ambiguous = any("=" in key for key in value)
        form = '"{}"={}' if ambiguous else "{}={}"
        return tuple(form.format(key, os.fspath(item)) for key, item in value.items())
    if value is None:
        return ()
    return _names(name, [value] if isinstance(value, str) else value)


def _listed(value: Any) -> Sequence[Any]:
    """A list; of one setting, it alone."""
    return [value] if isinstance(value, Settings) else value or ()


def _path(value: Place | None) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"{value!r} is not a path", fix='write it as text, such as "net.edgeship"')
    return str(os.fspath(value))


def _folder(value: Place | None) -> Path | None:
    path = _path(value)
    return None if path is None else Path(path)


def _weights(name: str | None) -> str | None:
    if name is not None:
        if not isinstance(name, str):
            raise UsageError(f"--weights {name!r} is not the name of an encoding", fix='write "int8" or "int4-g32"')
        if name == "auto":
            raise UsageError("--weights auto chooses among what a profile says", fix="give --profile auto")
        encoding_named(name)
    return name


def _metric(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UsageError(
            f"metric is a {type(value).__name__}, not a name",
            fix="give accuracy, perplexity, cosine, snr or file.py:function",
        )
    return value


def _one_of(name: str, value: T | None, known: Sequence[Any]) -> T | None:
    if value is not None and value not in known:
        raise UsageError(f"{option(name)} {value!r} is not one of {', '.join(map(str, known))}")
    return value


def _whole(name: str, value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise UsageError(f"{option(name)} {value!r} is not a whole number", fix="give one, such as 1024")
    return value


def _jobs(value: Any) -> int | None:
    count = _whole("jobs", value)
    if count is not None and not 0 < count <= MOST_JOBS:
        raise UsageError(f"--jobs {count} is not 1 to {MOST_JOBS}", fix="leave it out: cores and memory decide")
    return count


def _bytes(value: int | str | None) -> int | None:
    if value is None:
        return None
    return parse_bytes(value if isinstance(value, str) else f"{value:.0f}")


def _fraction(value: float | str | None) -> float | None:
    if value is None:
        return None
    return parse_fraction(value if isinstance(value, str) else f"{value:.12f}")
