"""Every model on inputs that noise does not show: docs/results/hard-inputs.md.

    python benchmarks/hard_inputs.py [--only NAME] [--runtime NAME] [--profile NAME]

Each cell is one ``edgeship build`` in a process of its own. check/verify asks the artifact zeros, one constant, 0..1,
0..255, noise a thousand times smaller and larger, a large mean with a small spread, sparse inputs, and 32 steps with
states fed back; every output and every group of slices of like size is held against the float original. The cell shows
the worst of them. A build that falls short publishes nothing and says which slice on which inputs.
Results are kept in docs/results/hard-inputs.json, so that a run goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from builds import TARGETS, portable, run_build
from coverage import sources
from real_models import real_models

from edgeship.engine.gathering import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
KEPT, PAGE = RESULTS / "hard-inputs.json", RESULTS / "hard-inputs.md"
LIMIT_SECONDS = 900
INTRODUCTION = """# Hard inputs: the worst slice of each model

Made by `python benchmarks/hard_inputs.py`, {date}, on {processor}, {cores} cores, {memory_gib} GiB, Python {python}.

Every cell is a build whose artifact was run by its own engine (Core ML by edgeship's evaluator, Hexagon by its emulator)
on noise or the model's own data, and on zeros, one constant, 0..1, 0..255, noise x 1e-3 and x 1e3, a large mean with a
small spread, sparse inputs, and, where an output comes back as an input, 32 steps with it fed back. The figure is the
worst group of slices of any output against the float original, in dB, with its place; "left out" counts kinds of inputs
that cannot be asked: the original itself moves as much when its values are rounded, or leaves the range of float16.
**short**: the check stopped the build. *refused*: the build ended before with a reason.
"""


def cell(arguments: list[str], runtime: str, profile: str, output: Path) -> dict[str, Any]:
    """One build: the worst slice, what was left out, or why there is none."""
    ran = run_build(arguments, runtime, profile, output, LIMIT_SECONDS)
    if ran.report is None:
        return {"outcome": "refused", "why": portable(ran.why), "code": ran.code, "seconds": ran.seconds}
    row = ran.report["rows"][0]
    verdict = next(item for item in row["verdicts"] if item["check"] == "check/verify")
    figures = {item["name"]: item for item in verdict["measurements"]}
    worst = figures.get("worst_slice_snr")
    return {
        "outcome": "ok" if verdict["passed"] else "short",
        "worst_db": worst["value"] if worst else figures["total_snr"]["value"],
        "where": worst["note"] if worst else "",
        "distinct": figures["worst_slice_distinct"]["value"] if worst else None,
        "left_out": verdict["summary"].count("; left out: "),
        "remark": verdict.get("remark", ""),
        "why": "" if verdict["passed"] else verdict["summary"],
        "seconds": ran.seconds,
    }


def write(cells: dict[str, dict[str, dict[str, Any]]]) -> None:
    """A table a profile, then every reason."""
    lines = [INTRODUCTION.format(date=datetime.date.today(), **machine())]
    reasons: list[str] = []
    for profile, rows in cells.items():
        lines += [f"## {profile}", "", "| model | " + " | ".join(TARGETS) + " |", "|---|" + "---|" * len(TARGETS)]
        for model, row in rows.items():
            texts = [_text(row.get(runtime)) for runtime in TARGETS]
            lines.append(f"| {model} | " + " | ".join(texts) + " |")
            reasons += [
                f"- **{model}, {runtime}, {profile}**: {row[runtime]['why']}"
                for runtime in TARGETS
                if row.get(runtime, {}).get("why")
            ]
        outcomes = [found["outcome"] for row in rows.values() for found in row.values()]
        counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("ok", "short", "refused"))
        lines += ["", f"{len(outcomes)} builds: {counts}.", ""]
    lines += ["## What fell short or was refused", "", *(reasons or ["Nothing."])]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _text(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not run"
    if found["outcome"] == "refused":
        return "*refused*"
    place = found["where"].rpartition(": ")[0].replace("|", " ")
    text = f"{found['worst_db']:.0f} dB, {place}" if place else f"{found['worst_db']:.0f} dB"
    if found["left_out"]:
        text += f", {found['left_out']} left out"
    if found["remark"]:
        text += ", marked"
    return f"**short** {text}" if found["outcome"] == "short" else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only")
    parser.add_argument("--runtime")
    parser.add_argument("--profile", action="append", choices=["exact", "balanced", "fast", "small"])
    parser.add_argument("--again", action="store_true", help="Run cells that are kept already.")
    parser.add_argument("--architectures", action="store_true", help="The models of coverage.md too.")
    given = parser.parse_args()
    cells: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {name: list(item.arguments) for name, item in real_models().items()}
        if given.architectures:
            models |= sources(folder, given.only)
        for profile in given.profile or ["exact", "balanced"]:
            for model, arguments in models.items():
                for runtime in TARGETS:
                    if given.only not in (None, model) or given.runtime not in (None, runtime):
                        continue
                    row = cells.setdefault(profile, {}).setdefault(model, {})
                    if runtime in row and not given.again:
                        continue
                    row[runtime] = cell(arguments, runtime, profile, folder / "bundle")
                    print(f"{profile:9} {model:24} {runtime:8} {row[runtime]}", flush=True)
                    KEPT.write_text(json.dumps(cells, indent=1) + "\n")
                    write(cells)


if __name__ == "__main__":
    main()
