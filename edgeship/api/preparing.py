"""From an order to a plan: check what was said, load the source, plan every route."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeship.api.given_models import find_model
from edgeship.api.orders import BuildOrder
from edgeship.api.rules import Situation, check_rules, check_runtime
from edgeship.core.model import TorchModel
from edgeship.core.planning import kept_weights
from edgeship.core.profile import AdapterRef, DataRef, Profile, Request
from edgeship.core.records import read_toml
from edgeship.core.registry import find, profiles, runtimes, targets
from edgeship.core.report import Refusal
from edgeship.core.target import Target
from edgeship.data.memory import GivenData
from edgeship.engine.cache import Cache
from edgeship.engine.chatter import Log, silenced
from edgeship.engine.examining import examine
from edgeship.engine.executor import Progress, execute
from edgeship.engine.gathering import Prepared
from edgeship.engine.planner import plan_build, plan_load, refusal_of
from edgeship.engine.sources import Found, find_source
from edgeship.errors import MissingToolError, UsageError

if TYPE_CHECKING:
    from edgeship.program.program import ProgramRecord


def prepare(
    order: BuildOrder,
    cache: Cache,
    log: Log,
    progress: Progress,
    expect: Callable[[Sequence[str]], None] = lambda names: None,
) -> Prepared:
    """Check the order, load the source, and plan every route.

    Args:
        expect: called with the runtimes that a network will be lowered for, before it is loaded.

    Raises:
        EdgeshipError: a name nobody knows, options that do not belong together, a source that cannot be read, data that
            do not fit, a route that does not exist.
    """
    profile = _profile(order.profile)
    chosen = _targets(order)
    with silenced(log):
        found = _source(order, cache)
    data = _Data.of(order, found)
    situation = Situation(order, found.source.form, data.is_calibrated, data.is_evaluated)
    check_rules(situation)
    requests = _requests(order, found, data, profile, chosen, situation.language)
    _refuse_idle_runtimes(order, requests)
    possible, left_out = _possible(order, requests)
    able, refused = _able(order, possible)
    if not situation.language:
        # A large language model is built in one process, whose memory is all that there is.
        expect(list(dict.fromkeys(request.runtime for request in able)))
    return _saying(left_out, refused, _loaded(order, able, data, cache, log, progress))


def _profile(name: str) -> Profile:
    """A profile by name, or of a TOML file, which must name runtimes that there are."""
    if not name.endswith(".toml"):
        return find("profile", profiles(), name)
    profile = read_toml(Profile, Path(name))
    for runtime in (*profile.runtimes, *profile.why):
        find("runtime", runtimes(), runtime)
    return profile


def _targets(order: BuildOrder) -> list[Target]:
    """The targets of an order, each once; the names of its runtimes are checked as well."""
    if not order.targets:
        raise UsageError("no target", fix=f"add --target, one of {', '.join(targets())}")
    chosen = [find("target", targets(), name) for name in dict.fromkeys(order.targets)]
    for name in order.runtimes:
        find("runtime", runtimes(), name)
    return chosen


def _source(order: BuildOrder, cache: Cache) -> Found:
    if order.model is not None:
        candidates = order.options.get("load/memory", {}).get("candidates")
        return find_model(order.model, order.outputs, order.renames, cache, cut=order.cut, candidates=candidates)
    return find_source(
        order.source,
        inputs=order.inputs,
        outputs=order.outputs,
        factory=order.factory,
        renames=order.renames,
        cut=order.cut,
        trust=order.trust,
    )


@dataclasses.dataclass(frozen=True)
class _Data:
    """What a build is calibrated and measured on, where anything was given.

    Args:
        calibration, evaluation: data in memory wait for the model, whose inputs they are put in the order of.
        metric: as the user named it.
    """

    calibration: DataRef | GivenData | None
    evaluation: DataRef | GivenData | None
    metric: str | None

    @property
    def is_calibrated(self) -> bool:
        """Whether there are data to calibrate on."""
        return self.calibration is not None

    @property
    def is_evaluated(self) -> bool:
        """Whether there are data to measure on."""
        return self.evaluation is not None

    @classmethod
    def of(cls, order: BuildOrder, found: Found) -> _Data:
        """The order's own data, or those that came with the source."""
        return cls(
            _described(order.calibration or found.calibration),
            _described(order.evaluation or found.evaluation),
            # The metric of a sample belongs to its own data.
            order.metric or (None if order.evaluation else found.metric),
        )


def _described(data: str | GivenData | None) -> DataRef | GivenData | None:
    from edgeship.data.batches import describe_data

    return describe_data(data) if isinstance(data, str) else data


def _requests(
    order: BuildOrder, found: Found, data: _Data, profile: Profile, chosen: Sequence[Target], language: bool
) -> list[Request]:
    """One request for each target and runtime."""
    load = {**found.load, "lora": order.lora, "part": order.part, "context": order.context}
    load["weights_key"] = order.weights_key
    adapters = _adapters(order.adapters)
    requests: list[Request] = []
    for target in chosen:
        for name in _engines(order.runtimes or target.runtime_names, language, asked=bool(order.runtimes)):
            if not runtimes()[name].runs_on(target):
                continue
            request = Request(
                source=found.source,
                target=target,
                runtime=name,
                profile=profile,
                weights=order.weights,
                activations=order.activations,
                metric=data.metric or ("perplexity" if language else None),
                max_size_bytes=order.max_size_bytes,
                max_drop=order.max_drop,
                options=order.options,
                load=load,
                context=order.context if language else None,
                kv_cache=order.kv_cache,
                adapters=adapters,
            )
            requests.append(request)
    return requests


def _refuse_idle_runtimes(order: BuildOrder, requests: Sequence[Request]) -> None:
    """Raise `UsageError` for a runtime that was asked for and that none of the targets runs."""
    planned = {request.runtime for request in requests}
    served = planned | {runtimes()[name].format.name for name in planned}
    for name in order.runtimes:
        if name not in served:
            able = [target.name for target in targets().values() if runtimes()[name].runs_on(target)]
            raise UsageError(
                f"{', '.join(order.targets)} does not run {name}", fix=f"add --target {able[0]}" if able else ""
            )


def _possible(order: BuildOrder, requests: Sequence[Request]) -> tuple[Sequence[Request], dict[str, str]]:
    """What can be built on this system, and why each runtime that is left out cannot.

    A runtime that the user named is never left out, nor is anything when nothing else remains.
    """
    if order.runtimes:
        return requests, {}
    reasons = {request.runtime: runtimes()[request.runtime].unpublished() for request in requests}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    possible = [request for request in requests if request.runtime not in left_out]
    return (possible, left_out) if possible else (requests, {})


def _able(order: BuildOrder, requests: Sequence[Request]) -> tuple[list[Request], list[Refusal]]:
    """What can be built with the packages that are installed, and a refusal for each runtime that lacks one.

    Raises:
        MissingToolError: no runtime is left, or the order is all or nothing.
    """
    able: list[Request] = []
    missing: dict[str, tuple[MissingToolError, list[str]]] = {}
    for request in requests:
        try:
            check_runtime(request)
        except MissingToolError as error:
            missing.setdefault(request.runtime, (error, []))[1].append(request.target.name)
        else:
            able.append(request)
    if missing and (order.all_or_nothing or not able):
        raise next(iter(missing.values()))[0]
    return able, [refusal_of(error, ",".join(names), runtime) for runtime, (error, names) in missing.items()]


def _saying(left_out: dict[str, str], refused: Sequence[Refusal], prepared: Prepared) -> Prepared:
    """The prepared build, whose plan and report say which runtimes are not in it."""
    known = (*refused, *prepared.plan.refused)
    prepared = dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, refused=known))
    if not left_out:
        return prepared
    skipped = {**prepared.plan.skipped, **{f"runtime {name}": reason for name, reason in left_out.items()}}
    remarks = [f"{name} is left out: {reason}" for name, reason in left_out.items()]
    plan = dataclasses.replace(prepared.plan, skipped=skipped)
    return dataclasses.replace(prepared, plan=plan, remarks=(*remarks, *prepared.remarks))


def _loaded(
    order: BuildOrder, requests: Sequence[Request], data: _Data, cache: Cache, log: Log, progress: Progress
) -> Prepared:
    """Load the source and plan the rest, which hangs on what operators and weights the model has."""
    from edgeship.program.program import read_record

    plan = plan_load(requests[0])
    execution = execute(plan, requests[0].source, cache, log, progress)
    loaded = execution.results[plan.steps[-1].index]
    assert isinstance(loaded, TorchModel)
    record = read_record(loaded)
    given = [item for item in (data.calibration, data.evaluation) if isinstance(item, GivenData)]
    remarks = tuple(f"{item.title}: the first {item.batches} batches were taken" for item in given if item.cut)
    calibration = _on_disk(data.calibration, loaded, record, cache)
    evaluation = _on_disk(data.evaluation, loaded, record, cache)
    with silenced(log):
        for reference in dict.fromkeys(filter(None, (calibration, evaluation))):
            # Read once before minutes of conversion; whole columns are checked, whatever the limit.
            remarks += examine(reference, loaded, record.signature)
    keep = kept_weights(order.keep, record.inventory)
    unbounded = tuple(spec.name for spec in record.signature.inputs if spec.is_float and spec.low is None)
    ready = tuple(
        dataclasses.replace(
            request,
            calibration=calibration,
            evaluation=evaluation,
            inventory=record.inventory,
            decoder=record.decoder,
            keep=keep,
            unbounded=unbounded,
        )
        for request in requests
    )
    whole = plan_build(ready, all_or_nothing=order.all_or_nothing)
    refused = {(item.target, item.runtime) for item in whole.refused}
    planned = tuple(item for item in ready if (item.target.name, item.runtime) not in refused)
    return Prepared(whole, planned, loaded, plan.steps[-1], execution, remarks, order.all_or_nothing)


def _adapters(given: Sequence[str]) -> tuple[AdapterRef, ...]:
    """Adapters that were ordered as ``NAME=DIR``. Raises `UsageError`, or `SourceError` where there is none."""
    from edgeship.frontends.lora import adapter_digest

    found: dict[str, AdapterRef] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not folder or not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
            raise UsageError(f"--adapter {text!r} is not NAME=DIR", fix="name it with letters, digits, - and _")
        # Their files are named after them, and Macs take capitals for small letters there.
        if name.lower() in (other.lower() for other in found):
            raise UsageError(
                f"two adapters are called {name}", fix="give each a name of its own, not by capitals alone"
            )
        found[name] = AdapterRef(name, str(Path(folder).absolute()), adapter_digest(Path(folder)))
    return tuple(found.values())


def _on_disk(
    data: DataRef | GivenData | None, model: TorchModel, record: ProgramRecord, cache: Cache
) -> DataRef | None:
    """Data as a file: what lies in memory is written into the cache; for a language model texts become windows."""
    from edgeship.data.memory import kept_data

    if isinstance(data, GivenData):
        data = kept_data(data, record.signature, cache.kept, text=record.decoder is not None)
    return data if data is None or record.decoder is None else _windows(data, model, cache)


def _windows(data: DataRef, model: TorchModel, cache: Cache) -> DataRef:
    """Data for a language model: a text becomes windows of tokens."""
    from edgeship.core.artifact import file_digest
    from edgeship.data.batches import describe_data
    from edgeship.data.text import is_text, tokenized
    from edgeship.program.program import ORIGIN

    if not is_text(data.reference):
        return data
    length = model.signature.inputs[0].shape[-1]
    tokenizer = model.path / ORIGIN / "tokenizer.json"
    made_of = {"text": data.digest, "tokenizer": file_digest(tokenizer), "length": length}
    path = cache.windows(made_of, lambda folder: tokenized(data, tokenizer, length, folder))
    return dataclasses.replace(describe_data(str(path)), title=data.title)


def _engines(names: Sequence[str], language: bool, *, asked: bool) -> list[str]:
    """The runtimes that take a source: those for networks, or the engines for language models of the same formats."""
    # A format's own engine comes before those of plug-ins.
    engines = {item.format.name: item.name for item in reversed(runtimes().values()) if item.engine.for_language}
    chosen = []
    for name in names:
        for_language = runtimes()[name].engine.for_language
        if for_language and not language:
            raise UsageError(
                f"{runtimes()[name].title} runs language models only",
                fix=f"use --runtime {runtimes()[name].format.name}",
            )
        if for_language or not language:
            chosen.append(name)
        elif name in engines:
            chosen.append(engines[name])
        elif asked:
            raise UsageError(
                f"{runtimes()[name].title} has no engine for language models here",
                fix=f"use one of {', '.join(engines.values())}, or give --input to build the network without a cache",
            )
    return list(dict.fromkeys(chosen))
