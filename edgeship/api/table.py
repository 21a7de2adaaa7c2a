"""The table that ends a build, in words: what the command line prints, and what a notebook shows."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from edgeship.core.report import ArtifactRow, Measurement, Report
from edgeship.core.units import counted, human_bytes

# A slice this far behind the whole output is told apart.
BEHIND_DB = 3.0
# Metrics that are not words, as people write them.
METRIC_TITLES = {"snr": "SNR"}


def headings(report: Report) -> list[str]:
    """What the columns are called; the metric's only where one was measured."""
    metric = next((found.name for row in report.rows if (found := metric_of(row))), "")
    names = ["artifact", "weights", "activations", "size", "SNR to original"]
    if metric:
        beside = " (original)" if any("(" in score_of(row) for row in report.rows) else ""
        names.append(METRIC_TITLES.get(metric, metric) + beside)
    return [*names, "latency here", "verdict"]


def cells(report: Report, row: ArtifactRow) -> list[str]:
    """One line of the table, a text for each of `headings`."""
    first = [f"{row.runtime}/{row.file}", row.weights, row.activations, human_bytes(row.size_bytes), error_of(row)]
    measured = any(metric_of(other) for other in report.rows)
    return [*first, *([score_of(row)] if measured else []), latency_of(row), verdict_of(row)]


def remarks(report: Report) -> list[str]:
    """Sentences under the table: numbers of samples, the worst slices, what is not timed, limits set by hand, notes."""
    lines = [sample_counts(report.rows), *map(worst_of, report.rows)]
    lines = [line for line in lines if line]
    for row in report.rows:
        latency = row.figure("latency_p50")
        if latency is not None and latency.value is None:
            lines.append(f"{row.runtime} is not timed here: {latency.note}")
    limits = dict.fromkeys(limit for row in report.rows for limit in row.by_hand)
    lines += [f"limit set by hand: {limit}" for limit in limits]
    for row in report.rows:
        lines += [f"{row.runtime}: {remark}" for remark in row.remarks]
    return [*lines, *report.notes]


def title_of(report: Report) -> str:
    """What was built, for what."""
    return f"{report.source} for {', '.join(report.targets)}, profile {report.profile}"


def error_of(row: ArtifactRow) -> str:
    """Signal over noise against the original, over all outputs."""
    snr = row.figure("total_snr")
    return "-" if snr is None or snr.value is None else f"{snr.value:.1f} dB"


def worst_of(row: ArtifactRow) -> str:
    """The slice of an output that is farthest from the original's; empty where none is far behind the whole."""
    snr, worst = row.figure("total_snr"), row.figure("worst_slice_snr")
    if snr is None or worst is None or snr.value is None or worst.value is None:
        return ""
    return f"{row.runtime}: farthest off is {worst.note}" if worst.value < snr.value - BEHIND_DB else ""


def metric_of(row: ArtifactRow) -> Measurement | None:
    """The figure of check/accuracy, whatever its metric is."""
    verdict = next((item for item in row.verdicts if item.check == "check/accuracy" and item.measurements), None)
    return verdict.measurements[0] if verdict else None


def score_of(row: ArtifactRow) -> str:
    """The metric with its unit, and the original's where that says something."""
    after = metric_of(row)
    before = row.figure(f"{after.name}_original") if after else None
    if after is None or before is None or after.value is None or before.value is None:
        return "-"
    if after.unit == "dB":
        return f"{after.value:.1f} dB"
    if after.unit == "cosine":
        return f"{after.value:.4f}"
    if after.unit == "fraction":
        return f"{after.value:.1%} ({before.value:.1%})"
    return f"{after.value:.4g} ({before.value:.4g})"


def sample_counts(rows: Sequence[ArtifactRow]) -> str:
    """``accuracy on 540 samples (tflite, onnx), 200 samples (qnn)``; empty where no metric was measured."""
    by_count: dict[int, list[str]] = {}
    name = ""
    for row in rows:
        found = metric_of(row)
        if found is not None:
            name = METRIC_TITLES.get(found.name, found.name)
            by_count.setdefault(found.runs, []).append(row.runtime)
    parts = [f"{counted(count, 'sample')} ({', '.join(runtimes)})" for count, runtimes in by_count.items()]
    return f"{name} on {', '.join(parts)}" if parts else ""


def latency_of(row: ArtifactRow) -> str:
    """The median of a run, or tokens a second."""
    decode = row.figure("decode")
    if decode is not None and decode.value is not None:
        return f"{decode.value:.3g} tokens/s"
    latency = row.figure("latency_p50")
    return "not timed" if latency is None or latency.value is None else f"{latency.value:.3g} ms"


def verdict_of(row: ArtifactRow) -> str:
    """Whether its checks hold, and whether the real engine ran."""
    how = "emulated" if row.execution == "emulated" else "run"
    limit = ", limit by hand" if row.by_hand else ""
    if not row.passed:
        return f"fell short{limit}"
    return f"ok, but loses much, {how}{limit}" if row.remarks else f"ok, {how}{limit}"


def failures(report: Report) -> list[str]:
    """What is missing and why: one sentence for each check that fell short and each route that was refused."""
    return [f"{what}; {fix}" if fix else what for what, fix in _failures(report)]


def first_failure(report: Report) -> tuple[str, str]:
    """What is missing first and why, and the way out, of a report that did not pass."""
    return _failures(report)[0]


def failed_runtimes(report: Report) -> list[str]:
    """The runtimes of which something is missing, each once, in the order of `failures`."""
    short = [row.runtime for row in report.rows if not row.passed]
    return list(dict.fromkeys([*short, *(item.runtime for item in report.refused)]))


def _failures(report: Report) -> list[tuple[str, str]]:
    found = []
    for row in report.rows:
        for verdict in row.verdicts:
            if not verdict.passed:
                found.append((f"{verdict.check} fell short on {verdict.runtime}: {verdict.summary}", verdict.fix))
    for item in report.refused:
        found.append((f"no artifact for {item.runtime}: {item.reason}", item.fix))
    # A check of each target of one artifact may say the same of all of them.
    return list(dict.fromkeys(found))


def report_lines(report: Report) -> list[str]:
    """The table as text, a line an artifact, for a Python prompt."""
    lines = []
    for row in report.rows:
        shown = [text for text in cells(report, row) if text != "-"]
        lines.append("  " + " | ".join(shown))
    return [*lines, *(f"  {line}" for line in failures(report))]


def report_html(report: Report, place: str) -> str:
    """The table for a notebook: one small piece of HTML with its styles in it, no script, every text escaped.

    Args:
        place: where the bundle lies.
    """
    passed = report.passed
    rows = "".join(_html_row(cells(report, row)) for row in report.rows)
    head = "".join(f"<th style='text-align:left'>{escape(name)}</th>" for name in headings(report))
    lines = [place if report.bundle else "nothing was published", *failures(report)]
    colour = "#1a7f37" if passed else "#cf222e"
    word = "passed" if passed else "fell short"
    return (
        f"<div><p><b>{escape(title_of(report))}</b> <span style='color:{colour}'>{word}</span></p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"{_html_lines([*lines, *remarks(report)])}</div>"
    )


def _html_row(texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td style='text-align:left'>{escape(text)}</td>" for text in texts) + "</tr>"


def _html_lines(lines: Sequence[str]) -> str:
    return "".join(f"<p style='margin:0.2em 0'>{escape(line)}</p>" for line in lines)
