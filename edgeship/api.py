"""What the command line calls and notebooks call: ``build``, ``plan``, ``bench``, ``verify``, ``inspect``."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from edgeship.core.artifact import INVENTORY
from edgeship.core.decoder import CacheType
from edgeship.core.device import Shipped, TextOrder
from edgeship.core.inventory import Inventory
from edgeship.core.model import Artifact, TorchModel
from edgeship.core.passes import Context
from edgeship.core.plan import Plan, Step
from edgeship.core.planning import kept_weights
from edgeship.core.profile import AdapterRef, DataRef, Profile, Request
from edgeship.core.records import read_json, read_toml
from edgeship.core.registry import devices, find, profiles, runtimes, targets
from edgeship.core.report import Measurement, Report
from edgeship.core.runtimes import Availability
from edgeship.engine.cache import Cache, default_cache_root, logs_folder
from edgeship.engine.chatter import Log, silenced
from edgeship.engine.examining import examine
from edgeship.engine.executor import Execution, Progress, Silence, execute
from edgeship.engine.gathering import Prepared, gather_all
from edgeship.engine.locating import with_places
from edgeship.engine.planner import plan_build, plan_load
from edgeship.engine.repair import MAX_ROUNDS, next_attempt
from edgeship.engine.sources import find_source, trusted_code
from edgeship.errors import ChangedError, MissingToolError, UsageError

MAX_BENCH_SECONDS = 3600
# How often a build starts again when what it reads changes under it.
MAX_TURNS = 3
LANGUAGE_FORMS = ("decoder", "llama2c")


@dataclass(frozen=True)
class BuildOrder:
    """Everything a user can say to ``build`` and ``plan``.

    Args:
        source: factory, file or folder. targets: names. runtimes: names; empty means each target's own list.
        renames: names for inputs, each ``OLD=NEW``.
        output: bundle folder; ``<name>.edgeship`` here when None. options: ``{"compress/quantize": {"bits": "8"}}``.
        metric: see `edgeship.data.metrics`; accuracy when None.
        context: positions that a language model's artifacts keep. lora: folder of a PEFT adapter to merge.
        part: ``encoder`` or ``decoder`` of an encoder-decoder; the whole network when None.
        kv_cache: how a language model's artifacts keep keys and values; each engine's own way when None.
        adapters: PEFT adapters that ship beside a language model, each as ``NAME=DIR``.
        keep: weights that keep more bits than the profile has, each as ``PATTERN`` or ``PATTERN=ENCODING``.
        max_drop: fraction. max_size_bytes: limit for each artifact's files.
        trust: run code that comes with the source: Python that its sample.toml names, pickles in a .pt2.
    """

    source: str
    targets: tuple[str, ...]
    runtimes: tuple[str, ...] = ()
    profile: str = "balanced"
    output: Path | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    renames: tuple[str, ...] = ()
    factory: str | None = None
    calibration: str | None = None
    evaluation: str | None = None
    metric: str | None = None
    max_size_bytes: int | None = None
    max_drop: float | None = None
    context: int | None = None
    kv_cache: CacheType | None = None
    lora: str | None = None
    part: str | None = None
    adapters: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    use_cache: bool = True
    trust: bool = False

    @property
    def bundle(self) -> Path:
        """Where the bundle goes."""
        if self.output is not None:
            return self.output if self.output.name not in ("", "..") else self.output.resolve()
        head, _, function = self.source.rpartition(":")
        name = Path(head or self.source).resolve().stem if head and function.isidentifier() else ""
        return Path(f"{name or Path(self.source).resolve().stem}.edgeship")


def build(order: BuildOrder, progress: Progress | None = None, log: Log | None = None) -> Report:
    """Build, check, and publish a bundle.

    Returns:
        The report; `Report.passed` is False, and nothing is published, when a check fell short.

    Raises:
        EdgeshipError: bad input, an unsupported operator, a missing tool, an unwritable output.
    """
    from edgeship.shipping.bundle import check_output
    from edgeship.shipping.replacing import remove_leftovers

    root = default_cache_root()
    check_output(order.bundle, root, _named_file(order.source))
    log = log or Log(log_path(order.bundle))
    progress = progress or Silence()
    with closing(Cache(root)) as cache:
        cache.sweep()
    remove_leftovers(order.bundle.resolve())
    for turn in range(MAX_TURNS):
        try:
            with closing(Cache(root, order.use_cache)) as cache:
                return _build(order, cache, log, progress)
        except ChangedError as error:
            if turn == MAX_TURNS - 1:
                raise
            log.line(f"== once more: {error.what}")
    raise AssertionError


def _build(order: BuildOrder, cache: Cache, log: Log, progress: Progress) -> Report:
    prepared = prepare(order, cache, log, progress)
    result: list[Report] = []
    rounds = 0
    while True:
        execution = _attempt(prepared, order, cache, log, progress, result)
        following = None if result[0].passed or rounds == MAX_ROUNDS else next_attempt(prepared, execution, result[0])
        if following is None:
            return result[0] if result[0].passed else with_places(prepared, execution, result[0], log)
        rounds += 1
        # What this build has made is taken up again, whatever the order says of older results.
        prepared, cache = following, dataclasses.replace(cache, read=True)
        log.line(f"== round {rounds}: a gate fell short")


def _named_file(source: str) -> Path | None:
    """The file or folder of a source, where it names one."""
    head, _, function = source.rpartition(":")
    names = [source, head] if function.isidentifier() else [source]
    return next((Path(name) for name in names if name and Path(name).exists()), None)


def _attempt(
    prepared: Prepared, order: BuildOrder, cache: Cache, log: Log, progress: Progress, result: list[Report]
) -> Execution:
    """Run a plan; publish when every check holds. The report ends up in ``result``."""

    def gather(step: Step, execution: Execution) -> None:
        gathered = gather_all(prepared, execution, order.bundle, order.source, log)
        result[:] = [gathered.report]
        if gathered.report.passed:
            digests = [cache.digests(model) for model in (prepared.loaded, *(item.artifact for item in gathered.built))]
            gathered = dataclasses.replace(gathered, digests=dict(ChainMap(*digests)))
            step.task.run(gathered, ctx=Context(order.bundle))
            result[:] = [dataclasses.replace(gathered.report, bundle=str(order.bundle))]

    done = [(prepared.load_step.task, prepared.loaded)]
    return execute(prepared.plan, prepared.requests[0].source, cache, log, progress, gather, done)


def plan(order: BuildOrder, log: Log | None = None, progress: Progress | None = None) -> Plan:
    """The plan that `build` would run. The source is loaded (or taken from the cache), nothing is converted."""
    with closing(Cache(default_cache_root(), order.use_cache)) as cache:
        return prepare(order, cache, log or side_log(), progress or Silence()).plan


def trusted(order: BuildOrder) -> list[str]:
    """What an order with ``trust`` lets run, one line each; nothing is run to find out."""
    return trusted_code(order.source) if order.trust else []


def log_path(bundle: Path) -> Path:
    """The log file beside a bundle."""
    return bundle.parent / f"{bundle.name}.log"


def side_log() -> Log:
    """The log of commands that write no bundle: in the cache, so that the log of a build stays what it was."""
    return Log(logs_folder() / "last.log")


def prepare(order: BuildOrder, cache: Cache, log: Log, progress: Progress) -> Prepared:
    """Check the order, load the source, and plan every route."""
    from edgeship.data.batches import describe_data

    if not order.targets:
        raise UsageError("no target", fix=f"add --target, one of {', '.join(targets())}")
    profile = _profile(order.profile)
    chosen = [find("target", targets(), name) for name in dict.fromkeys(order.targets)]
    for name in order.runtimes:
        find("runtime", runtimes(), name)
    found = find_source(
        order.source,
        inputs=order.inputs,
        outputs=order.outputs,
        factory=order.factory,
        renames=order.renames,
        trust=order.trust,
    )
    calibration = order.calibration or found.calibration
    evaluation = order.evaluation or found.evaluation
    calibration_ref: DataRef | None = describe_data(calibration) if calibration else None
    evaluation_ref: DataRef | None = describe_data(evaluation) if evaluation else None
    for option, asked in (("--max-drop", order.max_drop is not None), ("--metric", order.metric is not None)):
        if asked and evaluation is None:
            raise UsageError(f"{option} needs data to measure on", fix="add --eval DATA")
    metric = order.metric or (None if order.evaluation else found.metric)
    if found.source.form in LANGUAGE_FORMS:
        metric = metric or "perplexity"
    language = found.source.form in LANGUAGE_FORMS
    if order.part is not None and found.source.form != "huggingface":
        raise UsageError("--part is for encoder-decoders in Hugging Face folders", fix="leave it out")
    if order.context is not None and not language and order.part != "decoder":
        raise UsageError("--context is for language models", fix="leave it out; sizes are part of --input")
    if order.kv_cache is not None and not language:
        raise UsageError("--kv-cache is for language models", fix="leave it out; a network keeps nothing")
    if order.renames and language:
        raise UsageError("--input-name is for networks", fix="leave it out; an engine names a language model's inputs")
    if order.lora is not None and found.source.form != "decoder":
        raise UsageError("--lora is for language models in Hugging Face folders", fix="leave it out")
    if order.adapters and found.source.form != "decoder":
        raise UsageError("--adapter is for language models in Hugging Face folders", fix="leave it out")
    adapters = _adapters(order.adapters)
    requests: list[Request] = []
    for target in chosen:
        for name in _engines(order.runtimes or target.runtime_names, language, asked=bool(order.runtimes)):
            if name not in target.runtime_names and runtimes()[name].language_of not in target.runtime_names:
                continue
            requests.append(
                Request(
                    found.source, target, name, profile, None, calibration_ref, evaluation_ref,
                    metric, order.max_size_bytes, order.max_drop, options=order.options,
                    load={**found.load, "lora": order.lora, "part": order.part, "context": order.context},
                    context=order.context if language else None,
                    kv_cache=order.kv_cache,
                    adapters=adapters,
                )
            )  # fmt: skip
    for name in order.runtimes:
        if not any(name in (request.runtime, runtimes()[request.runtime].language_of) for request in requests):
            family = runtimes()[name].language_of or name
            able = [target.name for target in targets().values() if family in target.runtime_names]
            raise UsageError(
                f"{', '.join(order.targets)} does not run {name}", fix=f"add --target {able[0]}" if able else ""
            )
    for request in requests:
        runtimes()[request.runtime].versions()
        if order.kv_cache is not None:
            runtimes()[request.runtime].cache_of(order.kv_cache, request.choice)
        if adapters and not runtimes()[request.runtime].adapters:
            raise UsageError(
                f"{runtimes()[request.runtime].title} loads no adapters beside a model",
                fix=f"--lora merges one, or leave {request.runtime} out with --runtime",
            )
    load_plan = plan_load(requests[0])
    execution = execute(load_plan, found.source, cache, log, progress)
    loaded = execution.results[load_plan.steps[-1].index]
    assert isinstance(loaded, TorchModel)
    from edgeship.program.program import read_record

    record = read_record(loaded)
    if record.decoder is not None:
        calibration_ref, evaluation_ref = (_windows(data, loaded, cache) for data in (calibration_ref, evaluation_ref))
        requests = [
            dataclasses.replace(item, calibration=calibration_ref, evaluation=evaluation_ref) for item in requests
        ]
    remarks: tuple[str, ...] = ()
    with silenced(log):
        for data in dict.fromkeys(filter(None, (calibration_ref, evaluation_ref))):
            # Read once before minutes of conversion; whole columns are checked, whatever the limit.
            remarks += examine(data, loaded, record.signature)
    inventory = record.inventory
    keep = kept_weights(order.keep, inventory)
    unbounded = tuple(spec.name for spec in record.signature.inputs if spec.is_float and spec.low is None)
    ready = tuple(
        dataclasses.replace(item, inventory=inventory, decoder=record.decoder, keep=keep, unbounded=unbounded)
        for item in requests
    )
    return Prepared(plan_build(ready), ready, loaded, load_plan.steps[-1], execution, remarks)


def _adapters(given: Sequence[str]) -> tuple[AdapterRef, ...]:
    """Adapters that were ordered as ``NAME=DIR``. Raises `UsageError`, or `SourceError` where there is none."""
    from edgeship.frontends.lora import adapter_digest

    found: dict[str, AdapterRef] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not folder or not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
            raise UsageError(f"--adapter {text!r} is not NAME=DIR", fix="name it with letters, digits, - and _")
        if name in found:
            raise UsageError(f"two adapters are called {name}", fix="give each a name of its own")
        found[name] = AdapterRef(name, str(Path(folder).absolute()), adapter_digest(Path(folder)))
    return tuple(found.values())


def _windows(data: DataRef | None, model: TorchModel, cache: Cache) -> DataRef | None:
    """Data for a language model: a text becomes windows of tokens."""
    from edgeship.core.artifact import file_digest
    from edgeship.data.batches import describe_data
    from edgeship.data.text import is_text, tokenized
    from edgeship.program.program import ORIGIN

    if data is None or not is_text(data.reference):
        return data
    length = model.signature.inputs[0].shape[-1]
    tokenizer = model.path / ORIGIN / "tokenizer.json"
    made_of = {"text": data.digest, "tokenizer": file_digest(tokenizer), "length": length}
    path = cache.windows(made_of, lambda folder: tokenized(data, tokenizer, length, folder))
    return describe_data(str(path))


def _engines(names: Sequence[str], language: bool, *, asked: bool) -> list[str]:
    """The runtimes that take a source: those for networks, or the engines for language models of the same formats."""
    engines = {runtime.language_of: runtime.name for runtime in runtimes().values() if runtime.language_of}
    chosen = []
    for name in names:
        if not language and runtimes()[name].language_of:
            raise UsageError(
                f"{runtimes()[name].title} runs language models only",
                fix=f"use --runtime {runtimes()[name].language_of}",
            )
        if not language or runtimes()[name].language_of:
            chosen.append(name)
        elif name in engines:
            chosen.append(engines[name])
        elif asked:
            raise UsageError(
                f"{runtimes()[name].title} has no engine for language models here",
                fix=f"use one of {', '.join(engines.values())}, or give --input to build the network without a cache",
            )
    return list(dict.fromkeys(chosen))


def _profile(name: str) -> Profile:
    """A profile by name, or of a TOML file, which must name runtimes that there are."""
    if not name.endswith(".toml"):
        return find("profile", profiles(), name)
    profile = read_toml(Profile, Path(name))
    for runtime in (*profile.runtimes, *profile.why):
        find("runtime", runtimes(), runtime)
    return profile


def verify(bundle_path: Path, *, run: bool = True, log: Log | None = None) -> list[str]:
    """Check a bundle: the manifest against its schema, every byte against its digest, and that every artifact opens
    and runs here.

    Returns:
        One sentence a problem; empty when the bundle holds.
    """
    from edgeship.shipping.bundle import changed_files, opened, read_bundle, schema_problem

    bundle = read_bundle(bundle_path)
    problems = changed_files(bundle)
    schema = schema_problem(bundle_path)
    if schema:
        problems.append(f"manifest.json does not meet its schema: {schema}")
    if problems or not run:
        return problems
    for record in bundle.manifest.artifacts:
        problem = _runs(opened(bundle, record), log)
        if problem:
            problems.append(f"{record.main}: {problem}")
    return problems


def _runs(artifact: Artifact, log: Log | None) -> str:
    import contextlib

    import numpy as np

    from edgeship.core.model import Signature
    from edgeship.data.batches import generate_batches

    runtime = runtimes()[artifact.runtime]
    runtime.versions()
    batch = generate_batches(Signature(artifact.signature.inputs, ()), 1)[0]
    with silenced(log) if log else contextlib.nullcontext(), runtime.open(artifact) as session:
        outputs = session.run(batch)
    for spec in artifact.signature.outputs:
        if tuple(outputs[spec.name].shape) != spec.shape:
            return f"output {spec.name} has shape {outputs[spec.name].shape}, {spec.shape} recorded"
        if not bool(np.isfinite(outputs[spec.name]).all()):
            return f"output {spec.name} is not finite"
    return ""


def bench(
    bundle_path: Path, *, seconds: float = 2.0, device: str = "host", text: TextOrder | None = None
) -> list[tuple[str, Measurement]]:
    """The figures of every artifact of a bundle on a device: ``host``, ``estimate:TARGET``, or a plug-in's.

    Args:
        seconds: how long a network is timed. text: what a language model is timed on.

    Returns:
        (artifact, measurement) pairs; artifacts that cannot be timed here say why in the note.
    """
    from edgeship.shipping.bundle import check_whole, opened, read_bundle

    if not 0 < seconds <= MAX_BENCH_SECONDS:
        raise UsageError(f"{seconds:g} seconds is no time to measure for", fix=f"give 1 to {MAX_BENCH_SECONDS}")
    bundle = read_bundle(bundle_path)
    check_whole(bundle)
    name, _, argument = device.partition(":")
    place = find("device", devices(), name)
    if bool(argument) != bool(place.argument):
        shown = f"{name}:{place.argument}" if place.argument else name
        raise UsageError(f"{device!r} is not how the device {name} is named", fix=f"write {shown}")
    inventory = read_json(Inventory, bundle.path / INVENTORY)
    rows: list[tuple[str, Measurement]] = []
    for record in bundle.manifest.artifacts:
        stored = {key: item.bytes for key, item in record.encodings.items()}
        shipped = Shipped(opened(bundle, record), inventory, record.choice, stored, text)
        rows += [(record.main, item) for item in place.measure(shipped, argument, seconds)]
    return rows


def availability() -> list[Availability]:
    """Every runtime with its versions, or what to install."""
    rows = []
    for runtime in runtimes().values():
        try:
            found = ", ".join(f"{name} {version}" for name, version in runtime.versions().items())
            rows.append(Availability(runtime.name, runtime.title, True, found))
        except MissingToolError as error:
            rows.append(Availability(runtime.name, runtime.title, False, error.what, error.fix))
    return rows
