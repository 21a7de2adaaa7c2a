"""Ask a bundle on disk: whether it is whole and runs, and how fast it is. Which runtimes work here."""

from __future__ import annotations

from pathlib import Path

from edgeship.core.artifact import INVENTORY
from edgeship.core.device import Shipped, TextOrder
from edgeship.core.inventory import Inventory
from edgeship.core.model import Artifact
from edgeship.core.records import read_json
from edgeship.core.registry import devices, find, runtimes
from edgeship.core.report import Measurement
from edgeship.core.runtimes import Availability
from edgeship.engine.chatter import Log, silenced
from edgeship.errors import MissingToolError, UsageError

MAX_BENCH_SECONDS = 3600


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
    bundle_path: Path,
    *,
    seconds: float = 2.0,
    device: str = "host",
    text: TextOrder | None = None,
    only: str = "",
    said: tuple[str, ...] = ("text",),
) -> list[tuple[str, Measurement]]:
    """The figures of every artifact of a bundle on a device: ``host``, ``estimate:TARGET``, or a plug-in's.

    Args:
        seconds: how long a network is timed. text: what a language model is timed on.
        only: the main file of the one artifact to time; all when empty. said: what ``text`` is called in messages.

    Raises:
        UsageError: a device nobody knows, or ``text`` for a bundle of networks. ArtifactError: a file has changed.

    Returns:
        (artifact, measurement) pairs; artifacts that cannot be timed here say why in the note.
    """
    from edgeship.shipping.bundle import check_whole, opened, read_bundle

    if not 0 < seconds <= MAX_BENCH_SECONDS:
        raise UsageError(f"{seconds:g} seconds is no time to measure for", fix=f"give 1 to {MAX_BENCH_SECONDS}")
    bundle = read_bundle(bundle_path)
    check_whole(bundle)
    if text is not None and not any(item.language for item in bundle.manifest.artifacts):
        raise UsageError(f"{', '.join(said)} is for language models, and {bundle_path} has none", fix="leave it out")
    name, _, argument = device.partition(":")
    place = find("device", devices(), name)
    if bool(argument) != bool(place.argument):
        shown = f"{name}:{place.argument}" if place.argument else name
        raise UsageError(f"{device!r} is not how the device {name} is named", fix=f"write {shown}")
    inventory = read_json(Inventory, bundle.path / INVENTORY)
    rows: list[tuple[str, Measurement]] = []
    for record in bundle.manifest.artifacts:
        if only not in ("", record.main):
            continue
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
