"""Every decoder, encoder, vision, audio and sequence-to-sequence architecture that the installed transformers and timm
name: made small with random weights, built for the runtimes, and compared with the library's own eager model.

    python benchmarks/zoo.py [--minutes N] [--kind decoder] [--name NAME ...] [--again | --failed] [--page]

A row is one name, in a process of its own with limits on its time and memory; what is known is kept in zoo.json, so that
a run goes on where the last one ended. ONNX and LiteRT (for decoders their language engines) take all rows, Core ML and
Core AI a third, Hexagon a tenth, drawn by name. *passed*: decoders write 32 greedy tokens as transformers does and their
logits lie within 40 dB; others pass check/verify and answer as the eager model does. *refused*: the line that a user
reads. *failed*: anything else, such as another answer, an error that is not edgeship's own (exit 70), or no end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from results import RESULTS, write_page
from zoo_configs import VARIANTS
from zoo_rows import KINDS, LANGUAGE, NETWORK, Row, line_of, measure, rehearse, runtimes_of, trace

KEPT = RESULTS / "zoo.json"
# Of the limit on a row's own time: how much longer it may take by the clock.
WAITING = 12
STATES = ("passed", "refused", "failed", "not made")


def names_of(kind: str) -> list[str]:
    """All names of a kind, in an order that is drawn: whatever was run is a fair sample."""
    import transformers

    if kind == "timm":
        found = _of_timm()
    else:
        listed = (getattr(transformers, mapping) for mapping in KINDS[kind])
        found = {cls.model_type for mapping in listed for cls in mapping}
        found |= set(VARIANTS) if kind == "decoder" else set()
    names = sorted(found)
    random.Random(0).shuffle(names)
    return names


def _of_timm() -> set[str]:
    """The smallest model of each of timm's families, by its name's length of digits: none where timm is not there."""
    try:
        import timm
    except ImportError:
        return set()
    words = ("test_", "atto", "femto", "pico", "nano", "tiny", "xxs", "xs", "small", "_s", "b0", "18", "base")
    found = set()
    for family in timm.list_modules():
        models = timm.list_models(module=family)
        if models:
            found.add(min(models, key=lambda name: (_rank(name, words), len(name), name)))
    return found


def _rank(name: str, words: tuple[str, ...]) -> int:
    return next((place for place, word in enumerate(words) if word in name), len(words))


def in_child(kind: str, name: str, runtimes: list[str], seconds: int, gigabytes: int) -> Row:
    """`measure` in a process of its own, which shares what is imported."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        # Time of its own, whatever else the machine does; and an end for what waits.
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        signal.alarm(WAITING * seconds)
        resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))
        if not os.environ.get("ZOO_LOUD"):
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
        try:
            with tempfile.TemporaryDirectory() as folder:
                answer = measure(kind, name, runtimes, Path(folder))
        except BaseException as error:
            failed = {"state": "failed", "line": line_of(error) if isinstance(error, Exception) else repr(error)}
            answer = {runtime: {**failed, "trace": trace()} for runtime in runtimes}
        with os.fdopen(write, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    with contextlib.suppress(ValueError):
        found: Row = json.loads(text)
        return found
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    lines = {signal.SIGXCPU: f"longer than {seconds} s", signal.SIGALRM: f"no end after {WAITING * seconds} s"}
    line = lines.get(ended, f"its process died of {status}")
    return {runtime: {"state": "failed", "line": line} for runtime in runtimes}


def run(given: argparse.Namespace, known: dict[str, Row]) -> None:
    """Rows until the time is over."""
    kinds = given.kind or (*KINDS, "timm")
    end = time.monotonic() + 60 * given.minutes
    # What is imported before a process is forked is imported once.
    rehearse(kinds, given.runtime)
    for kind in kinds:
        for name in names_of(kind):
            if given.name and name not in given.name:
                continue
            if time.monotonic() > end:
                return
            key = f"{kind}/{name}"
            old = known.get(key, {})
            again = [r for r in old if given.again or (given.failed and old[r]["state"] in ("failed", "refused"))]
            wanted = [r for r in runtimes_of(kind, name) if not given.runtime or r in given.runtime]
            runtimes = [runtime for runtime in wanted if runtime not in old or runtime in again]
            if not runtimes:
                continue
            start = time.perf_counter()
            known[key] = {**old, **in_child(kind, name, runtimes, given.seconds, given.gigabytes)}
            for runtime in runtimes:
                cell = known[key][runtime]
                took = f"{time.perf_counter() - start:5.1f} s"
                said = cell.get("line", cell.get("snr", ""))
                print(f"{took}  {key:34s} {runtime:10s} {cell['state']:9s} {said}", flush=True)
                if given.name:
                    print("\n".join(cell.get("trace", [])))
            KEPT.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def page(known: Mapping[str, Row]) -> None:
    """Counts on top, failures first, then refusals by reason, then the names that passed."""
    counts: Counter[tuple[str, str, str]] = Counter()
    failures, refusals, made = [], {}, set()
    passed: dict[str, list[str]] = {}
    for key, row in sorted(known.items()):
        kind, name = key.split("/", 1)
        for runtime, cell in row.items():
            counts[kind, runtime, cell["state"]] += 1
            line = cell.get("line", "")
            if cell["state"] == "failed":
                failures.append(f"- {key}, {runtime}: {line}")
            elif cell["state"] == "refused":
                refusals.setdefault(line.replace(name, "NAME"), {}).setdefault(name, []).append(runtime)
            elif cell["state"] == "not made":
                made.add(f"- {key}: {line}")
        if all(cell["state"] == "passed" for cell in row.values()):
            passed.setdefault(kind, []).append(name)
    rows = []
    for kind in (*KINDS, "timm"):
        for runtime in LANGUAGE if kind == "decoder" else NETWORK:
            numbers = [counts[kind, runtime, state] for state in STATES]
            if sum(numbers):
                tried = sum(numbers[:3])
                rows.append([kind, runtime, *map(str, numbers), f"{numbers[0] / tried:.0%}" if tried else "-"])
    parts = ["## Failed", *(failures or ["Nothing."]), "\n## Refused, by reason"]
    for line, names in sorted(refusals.items(), key=lambda item: -len(item[1])):
        listed = ", ".join(f"{name} ({', '.join(runtimes)})" for name, runtimes in names.items())
        parts.append(f"- {line}\n  - {listed}")
    parts.append("\n## Passed everywhere they were tried")
    parts += [f"{kind} ({len(names)}): {', '.join(names)}.\n" for kind, names in passed.items()]
    parts += ["## Not made small, so not tried", *sorted(made)]
    waiting = {kind: [name for name in names_of(kind) if f"{kind}/{name}" not in known] for kind in (*KINDS, "timm")}
    parts += ["\n## Not run yet"]
    parts += [f"{kind} ({len(names)}): {', '.join(sorted(names))}.\n" for kind, names in waiting.items() if names]
    write_page(
        "zoo",
        "Every architecture that transformers and timm name, small",
        "python benchmarks/zoo.py",
        ("edgeship", "torch", "transformers", "onnxruntime-genai", "ai-edge-litert", "coremltools", "coreai-core"),
        ("kind", "runtime", *STATES, "passed of those made"),
        rows,
        before=" ".join((__doc__ or "").split("\n\n")[2].split()),
        after="\n".join(parts),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kind", action="append", choices=(*KINDS, "timm"))
    parser.add_argument("--name", action="append")
    parser.add_argument("--runtime", action="append", choices=(*LANGUAGE, *NETWORK))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--failed", action="store_true", help="again, what did not pass")
    parser.add_argument("--seconds", type=int, default=300, help="of processor, for one row")
    parser.add_argument("--gigabytes", type=int, default=24, help="of addresses, for one row")
    parser.add_argument("--page", action="store_true", help="write the page of what is known, run nothing")
    given = parser.parse_args()
    known: dict[str, Row] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    if not given.page:
        run(given, known)
    page(known)


if __name__ == "__main__":
    sys.exit(main())
