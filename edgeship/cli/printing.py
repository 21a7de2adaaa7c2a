"""Tables and progress for people. Numbers become human here, and nowhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from edgeship.cli.interrupt import stop_if_pressed
from edgeship.core.plan import Step
from edgeship.core.profile import Profile
from edgeship.core.report import ArtifactRow, Measurement, Report
from edgeship.core.runtimes import Availability
from edgeship.core.target import Target
from edgeship.core.units import human_bytes

# Columns when stdout is a file or a pipe, where nobody wraps lines.
FILE_WIDTH = 150


class Shown:
    """Progress on stderr: one line a finished step with its time, and a spinner for each running one on a terminal.

    It writes to its own copy of stderr, because the executor sends the real one to the log while a step runs.
    """

    def __init__(self) -> None:
        self._stream = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
        self._console = Console(file=self._stream, highlight=False)
        self._live: Progress | None = None
        self._tasks: dict[int, TaskID] = {}

    def started(self, step: Step) -> None:
        """Start a spinner."""
        stop_if_pressed()
        if self._console.is_terminal:
            if self._live is None:
                columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
                self._live = Progress(*columns, console=self._console, transient=True)
                self._live.start()
            self._tasks[step.index] = self._live.add_task(_title(step), total=None)

    def moved(self, step: Step, done: int, total: int, what: str) -> None:
        """Say how far a step is."""
        stop_if_pressed()
        if self._live is not None and step.index in self._tasks:
            self._live.update(self._tasks[step.index], description=f"{_title(step)}  {done}/{total} {what}")

    def said(self, step: Step, line: str) -> None:
        """Print a line under the steps before."""
        self._console.print(f"  {step.name}: {line}", markup=False, soft_wrap=True)

    def finished(self, step: Step, seconds: float, cached: bool) -> None:
        """Print the step with its time."""
        self._stop(step)
        mark, when = ("=", "from cache") if cached else ("+", f"{seconds:.1f} s")
        self._console.print(f"{mark} {_title(step):<62} {when}", markup=False)

    def failed(self, step: Step) -> None:
        """Print that the step failed."""
        self._stop(step)
        self._console.print(f"! {_title(step)}", markup=False)

    def close(self) -> None:
        """Give the terminal back."""
        self._stop(None)
        self._stream.close()

    def _stop(self, step: Step | None) -> None:
        """Take away the spinner of a step, or all of them; nothing is drawn once none is left."""
        if self._live is None:
            return
        task = self._tasks.pop(step.index, None) if step is not None else None
        if task is not None and self._tasks:
            self._live.remove_task(task)
        else:
            self._live.stop()
            self._live = None
            self._tasks.clear()


def _title(step: Step) -> str:
    runtimes = ",".join(dict.fromkeys(runtime for _, runtime in step.routes))
    shared = step.made == "TorchModel" or step.made == "Bundle"
    return f"{step.name:<26}" + ("" if shared else f" {runtimes}")


def console() -> Console:
    """Stdout, wide enough for the tables when it is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)


def print_report(report: Report) -> None:
    """The table that ends a build, then where the bundle is."""
    from edgeship.api.table import cells, headings, remarks, title_of

    table = Table(title=title_of(report), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in headings(report):
        # Words wrap, figures do not.
        figures = name not in ("artifact", "weights", "activations", "verdict")
        wraps = name in ("weights", "activations")
        in_two_lines = "\n".join(name.rsplit(" ", 1))
        table.add_column(in_two_lines, justify="right" if figures else "left", no_wrap=not wraps)
    for row in report.rows:
        *texts, verdict = cells(report, row)
        table.add_row(*(Text(text) for text in texts), Text(verdict, style=_colour(row)))
    out = console()
    out.print(table)
    for line in remarks(report):
        out.print(line, markup=False)
    for line in map(str, report.refused):
        out.print(f"no artifact: {line}", markup=False)
    if report.bundle:
        out.print(f"bundle: {report.bundle}   log: {report.log}", markup=False)
    else:
        out.print(f"not published   log: {report.log}", markup=False)


def _colour(row: ArtifactRow) -> str:
    if not row.passed:
        return "red"
    return "yellow" if row.remarks else "green"


def print_bench(rows: Sequence[tuple[str, Measurement]]) -> None:
    """One line an artifact: percentiles and memory, or why it is not timed."""
    table = Table()
    for name in ("artifact", "how", "p50", "p90", "p99", "load", "peak memory", "note"):
        table.add_column(name, justify="left" if name in ("artifact", "how", "note") else "right")
    by_artifact: dict[str, dict[str, Measurement]] = {}
    for artifact, item in rows:
        by_artifact.setdefault(artifact, {})[item.name] = item
    for artifact, found in by_artifact.items():
        first = next(iter(found.values()))
        middle = found.get("latency_p50") or found.get("latency_estimate")
        latencies = (middle, found.get("latency_p90"), found.get("latency_p99"), found.get("load_time"))
        how: str = "not timed" if first.value is None else first.how
        if first.device != "host":
            how += f" for {first.device}"
        table.add_row(artifact, how, *map(_ms, latencies), shown_bytes(found.get("peak_memory")), first.note)
    console().print(table)


def shown_bytes(item: Measurement | None) -> str:
    """Memory as people read it; a dash where none was taken."""
    return "-" if item is None or item.value is None else human_bytes(item.value)


def _ms(item: Measurement | None) -> str:
    if item is None or item.value is None:
        return "-"
    band = f" ({item.low:.3g}-{item.high:.3g})" if item.low is not None and item.high is not None else ""
    return f"{item.value:.3g} ms{band}"


def print_targets(known: Mapping[str, Target]) -> None:
    """All targets, one line each."""
    table = Table()
    for name in ("target", "device", "chip", "runtimes", "app memory"):
        table.add_column(name)
    for target in known.values():
        memory = human_bytes(float(target.app_memory_bytes.value))
        table.add_row(target.name, target.title, str(target.chip.value), ", ".join(target.runtime_names), memory)
    console().print(table)


def print_target(target: Target) -> None:
    """Every fact of one target with its source."""
    from edgeship.core.records import to_plain
    from edgeship.core.target import Fact

    table = Table(title=f"{target.title} ({target.name})", title_justify="left")
    for name in ("fact", "value", "trust", "source"):
        table.add_column(name, overflow="fold")
    for key, value in vars(target).items():
        facts: dict[str, Fact] = {}
        if isinstance(value, Fact):
            facts[key] = value
        elif isinstance(value, dict):
            facts = {f"{key}.{inner}": fact for inner, fact in value.items()}
        for name, fact in facts.items():
            table.add_row(name, str(to_plain(fact.value)), fact.trust, fact.source)
    console().print(table)


def print_profiles(known: Mapping[str, Profile]) -> None:
    """All profiles with what each runtime gets."""
    for profile in known.values():
        out = console()
        out.print(f"{profile.name}: {profile.summary}", markup=False)
        out.print(
            f"    default: {profile.default.weights} weights, {profile.default.activations} activations", markup=False
        )
        for runtime, choice in profile.runtimes.items():
            why = profile.why.get(runtime, "")
            out.print(f"    {runtime}: {choice.weights} weights, {choice.activations} activations. {why}", markup=False)


def pass_rows() -> list[dict[str, Any]]:
    """Every pass as plain data."""
    from edgeship.core.plan import made_name
    from edgeship.core.registry import passes

    rows: list[dict[str, Any]] = []
    for name, cls in passes().items():
        takes, makes = cls.edges()
        rows.append(
            {
                "name": name,
                "shape": cls.shape(),
                "takes": {key: kind.kind for key, kind in takes.items()},
                "makes": made_name(makes),
                "summary": cls.summary(),
                "options": list(cls.options()),
                "follows": cls.follows(),
            }
        )
    return rows


def print_passes(rows: Sequence[Mapping[str, Any]]) -> None:
    """All passes, one line each."""
    table = Table()
    for name in ("pass", "makes", "what it does", "options (--set)"):
        table.add_column(name)
    for row in rows:
        table.add_row(row["name"], row["makes"], row["summary"], ", ".join(row["options"]))
    console().print(table)


def print_runtimes(rows: Sequence[Availability]) -> None:
    """All runtimes and whether they work here."""
    table = Table()
    for name in ("runtime", "engine", "works here", "detail"):
        table.add_column(name)
    for row in rows:
        detail = row.detail if row.ok else f"{row.detail}; {row.fix}"
        table.add_row(row.name, row.title, "yes" if row.ok else "no", detail.replace("[", "\\["))
    console().print(table)


def print_inspection(found: Mapping[str, Any]) -> None:
    """What `inspect_path` found."""
    out = console()
    for artifact in found["artifacts"]:
        out.print(f"{artifact['main']}: {artifact['runtime']}, {human_bytes(artifact['bytes'])}, "
                  f"{artifact['bits_per_weight']:.2f} bits per weight", markup=False)  # fmt: skip
        for kind in ("inputs", "outputs"):
            out.print(f"  {kind}: {', '.join(artifact[kind])}", markup=False)
        table = Table()
        for name in ("encoding", "weights", "elements", "bytes"):
            table.add_column(name, justify="left" if name == "encoding" else "right")
        for row in artifact["encodings"]:
            table.add_row(row["encoding"], str(row["weights"]), f"{row['elements']:,}", human_bytes(row["bytes"]))
        out.print(table)
        layers = Table()
        for name in ("layer", "encoding", "shape", "bytes", "error", "output noise / signal"):
            layers.add_column(name, justify="left" if name in ("layer", "encoding", "shape") else "right")
        # What costs the outputs most comes first.
        for name, layer in sorted(artifact["layers"].items(), key=lambda item: -(item[1]["loss"] or 0)):
            ratio, loss = layer["snr_db"], layer["loss"]
            error = "-" if ratio is None else f"{ratio:.1f} dB"
            cost = "-" if loss is None else f"{loss:.2g}"
            shape = "x".join(map(str, layer["shape"]))
            layers.add_row(name, layer["encoding"], shape, human_bytes(layer["bytes"]), error, cost)
        out.print(layers)


def show_log(path: Path) -> None:
    """The log, on stderr."""
    if path.is_file():
        sys.stderr.write(path.read_text(encoding="utf-8", errors="replace"))
