"""Time an artifact on this machine, in a process of its own, so that peak memory is its own too."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from edgeship.core.device import Device, Shipped, TextOrder
from edgeship.core.model import Artifact
from edgeship.core.records import from_plain, to_plain
from edgeship.core.registry import artifacts, runtimes
from edgeship.core.report import Measurement
from edgeship.errors import ArtifactError

WARMUP_RUNS = 5
MIN_RUNS = 20
MAX_RUNS = 200
SECONDS = 1.5
TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class TextRuns:
    """How a language model is timed: ``runs`` times ``new`` tokens, after ``prompt`` tokens, after ``depth`` others."""

    prompt: int
    new: int
    depth: int
    runs: int


@dataclass(frozen=True)
class Work:
    """What the child is told: how long a network is timed, or how a language model is."""

    seconds: float = SECONDS
    text: TextRuns | None = None


@dataclass(frozen=True)
class TextRun:
    """Seconds of one run: of the prompt, and of the ``decoded`` tokens behind the first."""

    prefill_s: float
    decode_s: float
    decoded: int


@dataclass(frozen=True)
class Timed:
    """What the child measured.

    Args:
        load_ms: until the first answer. peak_bytes: the most memory, of which ``baseline_bytes`` before the model.
        times_ms: of each run of a network. texts: of each run of a language model.
        loop: tokens in the circle that a text ended in; 0 when it did not.
    """

    load_ms: float
    peak_bytes: int
    baseline_bytes: int
    times_ms: tuple[float, ...] = ()
    texts: tuple[TextRun, ...] = ()
    loop: int = 0


def time_artifact(
    artifact: Artifact, seconds: float = SECONDS, text: TextOrder | None = None
) -> tuple[Measurement, ...]:
    """Latency (p50, p90, p99 after warm-up, ms) and peak memory (bytes) of one artifact, one input at a time; of a
    language model tokens per second, and the time to the first token.

    A runtime whose speed here means nothing gives one measurement without a value, with the reason in its note.

    Args:
        text: what a language model is timed on.

    Raises:
        ArtifactError: the artifact does not run.
    """
    runtime = runtimes()[artifact.runtime]
    if runtime.engine.untimed:
        note = runtime.engine.untimed
        return (Measurement("latency_p50", None, "ms", "emulated", runtime=runtime.name, note=note),)
    if runtime.engine.for_language:
        text = text or TextOrder()
        return tuple(figure for depth in text.depths for figure in _time_text(artifact, text, depth))
    found = _worked(artifact, Work(seconds))
    runs = len(found.times_ms)
    versions = runtime.versions()

    def figure(name: str, value: float, unit: str) -> Measurement:
        return Measurement(name, value, unit, "measured", runtime=runtime.name, runs=runs, versions=versions)

    return (
        *(figure(f"latency_p{share}", percentile(found.times_ms, share), "ms") for share in (50, 90, 99)),
        figure("load_time", found.load_ms, "ms"),
        figure("peak_memory", found.peak_bytes, "bytes"),
        figure("engine_memory", found.baseline_bytes, "bytes"),
    )


def _time_text(artifact: Artifact, text: TextOrder, depth: int) -> tuple[Measurement, ...]:
    """Figures of a language model behind ``depth`` tokens: mean over runs, with their smallest and largest."""
    runtime = runtimes()[artifact.runtime]
    context, suffix = artifact.spoken().context, f"@{depth}" if depth else ""
    prompt = min(text.prompt, max(1, context - depth - text.new))
    new = min(text.new, context - depth - prompt)
    if new < 2:
        reason = f"{depth} tokens of depth, {text.prompt} of prompt and {text.new} new do not fit {context} positions"
        return (Measurement(f"decode{suffix}", None, "tokens/s", "measured", runtime=runtime.name, note=reason),)
    found = _worked(artifact, Work(text=TextRuns(prompt, new, depth, text.runs)))
    stuck = f"the text ends in a loop of {found.loop} tokens" if found.loop else ""
    versions = runtime.versions()

    def figure(name: str, values: Sequence[float], unit: str, note: str = "") -> Measurement:
        return Measurement(
            name + suffix, sum(values) / len(values), unit, "measured", runtime=runtime.name, low=min(values),
            high=max(values), runs=len(values), versions=versions, note=note,
        )  # fmt: skip

    return (
        figure("prefill", [prompt / run.prefill_s for run in found.texts], "tokens/s", f"{prompt} tokens"),
        figure("decode", [run.decoded / run.decode_s for run in found.texts], "tokens/s", stuck),
        figure("first_token", [1000 * run.prefill_s for run in found.texts], "ms", f"after {prompt} tokens"),
        figure("load_time", [found.load_ms], "ms"),
        figure("peak_memory", [found.peak_bytes], "bytes"),
        figure("engine_memory", [found.baseline_bytes], "bytes"),
    )


def _worked(artifact: Artifact, work: Work) -> Timed:
    """What the child measured."""
    order = json.dumps({"artifact": to_plain(artifact), "work": to_plain(work)})
    worker = [sys.executable, "-m", "edgeship.devices.host"]
    done = subprocess.run(worker, input=order, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ArtifactError(f"{artifact.path.name} does not run: {last}", fix="build it again")
    return from_plain(Timed, json.loads(lines[-1]))


class Host(Device):
    """This machine."""

    name: ClassVar[str] = "host"
    summary: ClassVar[str] = "this machine: latency and peak memory, in a process of its own"

    def measure(self, shipped: Shipped, argument: str, seconds: float) -> tuple[Measurement, ...]:
        """As `time_artifact`."""
        return time_artifact(shipped.artifact, seconds, shipped.text)


DEVICE = Host()


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` percent lie, by linear interpolation."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _peak_bytes() -> int:
    """The most memory this process had. On Linux not from getrusage: there a child starts with its parent's peak."""
    import resource

    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes there, the others kilobytes.
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _work() -> None:
    """In the child: open, warm up, run, print one line of JSON."""
    import time

    from edgeship.core.model import Signature
    from edgeship.data.batches import generate_batches

    order = json.loads(sys.stdin.read())
    artifact, work = (
        from_plain(artifacts()[order["artifact"]["kind"]], order["artifact"]),
        from_plain(Work, order["work"]),
    )
    runtime = runtimes()[artifact.runtime]
    runtime.versions()
    batch = generate_batches(Signature(artifact.signature.inputs, ()), 1)[0]
    runtime.warm_imports()
    baseline = _peak_bytes()
    begin = time.perf_counter()
    if work.text is not None:
        texts, load_ms, loop = _work_text(artifact, work.text, begin)
        _write(Timed(load_ms, _peak_bytes(), baseline, texts=texts, loop=loop))
        return
    with runtime.open_fast(artifact) as session:
        session.run(batch)
        load_ms = (time.perf_counter() - begin) * 1000
        for _ in range(WARMUP_RUNS):
            session.run(batch)
        times: list[float] = []
        end = time.perf_counter() + work.seconds
        while len(times) < MIN_RUNS or (time.perf_counter() < end and len(times) < MAX_RUNS):
            start = time.perf_counter()
            session.run(batch)
            times.append((time.perf_counter() - start) * 1000)
    _write(Timed(load_ms, _peak_bytes(), baseline, tuple(times)))


def _work_text(artifact: Artifact, text: TextRuns, begin: float) -> tuple[tuple[TextRun, ...], float, int]:
    """In the child: time texts of random tokens, which no engine can foresee. The times, those of loading in ms, and
    the length of the loop that the last one ended in."""
    import time

    from edgeship.llm.generation import find_loop
    from edgeship.llm.session import LanguageSession

    high = int(artifact.signature.inputs[0].high or 1)
    tokens = random.Random(0).choices(range(high + 1), k=text.depth + text.prompt)
    runs = []
    with runtimes()[artifact.runtime].open_fast(artifact) as session:
        assert isinstance(session, LanguageSession)
        load_ms = (time.perf_counter() - begin) * 1000
        for run in range(text.runs + 1):
            times = session.time_text(tokens[text.depth :], text.new, tokens[: text.depth])
            # The first run pays for pages and caches.
            if run:
                runs.append(TextRun(times.prefill_s, times.decode_s, times.decoded))
        loop = find_loop(times.tokens)
    return tuple(runs), load_ms, len(loop.cycle) if loop else 0


def _write(result: Timed) -> None:
    sys.stdout.write("\n" + json.dumps(to_plain(result)) + "\n")


if __name__ == "__main__":
    _work()
