"""Build every model for every runtime and write what came out: docs/results/coverage.md.

    python benchmarks/coverage.py [--only NAME] [--runtime NAME] [--profile NAME]

Each cell is one ``edgeship build`` in a process of its own, verified as a user's build is. A cell that fails says why.
Results are kept in docs/results/coverage.json, so that one model can be run again alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from builds import TARGETS, portable, run_build
from models import ARCHITECTURES, SHARED, cifar_files, cifar_source

from edgeship.core.units import human_bytes
from edgeship.engine.gathering import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
LIMIT_SECONDS = 1500
TRAINED = (
    "digits_cnn",
    "language_id",
    "UltraFace slim-320 (ONNX)",
    "ResNet-20 (CIFAR-10)",
    "ResNet-56 (CIFAR-10)",
)
INTRODUCTION = """# Coverage: model x runtime

Made by `python benchmarks/coverage.py`, profile `{profile}`, {date}, on {processor}, {cores} cores, {memory_gib} GiB,
Python {python}. Versions: {versions}.

Every cell is a build that was verified: the weights read back from the saved file equal what was decided, and the
artifact ran here on generated or evaluation inputs. A cell shows the ratio to the reference with the same stored numbers
/ to the float original (dB), the size on disk, and accuracy (the original's) where there are labels. ONNX and LiteRT run
in their engines, Core AI in its Linux runtime, Core ML in edgeship's evaluator, QNN in the HTP emulator. The first five
models are trained, the others have random weights.
"""


def sources(folder: Path, only: str | None) -> dict[str, list[str]]:
    """Model name -> the arguments of ``edgeship build`` that name it."""
    found: dict[str, list[str]] = {"digits_cnn": [str(ROOT / "samples" / "digits_cnn")]}
    found["language_id"] = [str(ROOT / "samples" / "language_id")]
    if SHARED.is_dir():
        found["UltraFace slim-320 (ONNX)"] = [str(SHARED / "models" / "ultraface" / "version-slim-320.onnx")]
        calibration, evaluation = cifar_files(folder, evaluation=1000)
        for depth in (20, 56):
            found[f"ResNet-{depth} (CIFAR-10)"] = [*cifar_source(depth, calibration, evaluation), "--max-drop", "1%"]
    for name, (factory, spec) in ARCHITECTURES.items():
        if only is not None and only != name:
            found[name] = []
            continue
        if name.startswith("Whisper"):
            found[name] = [f"{ROOT / 'benchmarks' / 'models.py'}:{factory.__name__}", "--input", str(spec)]
            continue
        place = folder / factory.__name__
        torch.manual_seed(0)
        factory().save_pretrained(place)
        found[name] = [str(place), *(["--input", spec] if spec else [])]
    return {name: arguments for name, arguments in found.items() if only in (None, name)}


def run(arguments: list[str], runtime: str, profile: str, output: Path) -> dict[str, Any]:
    """One cell: the figures of a build, or the line in which it failed."""
    ran = run_build(arguments, runtime, profile, output, LIMIT_SECONDS)
    if ran.report is None:
        return {"error": ran.why}
    row = ran.report["rows"][0]
    figures = {item["name"]: item["value"] for verdict in row["verdicts"] for item in verdict["measurements"]}
    failed = [verdict["summary"] for verdict in row["verdicts"] if not verdict["passed"]]
    return {
        "error": "; ".join(failed) or None,
        "lowering_db": figures.get("lowering_snr"),
        "total_db": figures.get("total_snr"),
        "accuracy": figures.get("accuracy"),
        "accuracy_original": figures.get("accuracy_original"),
        "read_back": figures.get("weights_read_back"),
        "bytes": row["size_bytes"],
        "seconds": ran.seconds,
        "versions": ran.report["versions"],
    }


def write(cells: dict[str, dict[str, Any]], profile: str) -> None:
    """The table, then every reason."""
    about = machine()
    versions: dict[str, str] = {}
    for row in cells.values():
        for cell in row.values():
            versions.update(cell.get("versions") or {})
    tools = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    header = " | ".join(TARGETS)
    lines = [
        INTRODUCTION.format(profile=profile, date=datetime.date.today(), versions=tools, **about),
        f"| model | {header} |",
        "|---|" + "---|" * len(TARGETS),
    ]
    reasons = []
    for model in (*TRAINED, *ARCHITECTURES):
        row = cells.get(model, {})
        texts = []
        for runtime in TARGETS:
            cell = row.get(runtime)
            if cell is None:
                texts.append("not run")
                continue
            if cell.get("error"):
                reasons.append(f"- **{model}, {runtime}**: {portable(cell['error'])}")
            if cell.get("lowering_db") is None:
                texts.append("**fails** (below)")
                continue
            text = f"{cell['lowering_db']:.0f} / {cell['total_db']:.0f} dB, {human_bytes(cell['bytes'])}"
            if cell.get("accuracy") is not None:
                text += f", {cell['accuracy']:.1%} ({cell['accuracy_original']:.1%})"
            texts.append(text + (" **falls short** (below)" if cell.get("error") else ""))
        lines.append(f"| {model} | " + " | ".join(texts) + " |")
    lines += ["", "## What fails, and why", "", *(reasons or ["Every cell passes."]), ""]
    times = [cell["seconds"] for row in cells.values() for cell in row.values() if cell.get("seconds")]
    if times:
        lines.append(
            f"Build times: {min(times):.0f} to {max(times):.0f} s a cell, whole process, steps shared by cache."
        )
    (RESULTS / "coverage.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only")
    parser.add_argument("--runtime")
    parser.add_argument("--profile", default="balanced")
    given = parser.parse_args()
    kept = RESULTS / "coverage.json"
    cells: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for model, arguments in sources(folder, given.only).items():
            for runtime in TARGETS:
                if given.runtime not in (None, runtime):
                    continue
                cell = run(arguments, runtime, given.profile, folder / "bundle")
                cells.setdefault(model, {})[runtime] = cell
                print(f"{model:28} {runtime:8} {cell}", flush=True)
                RESULTS.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(cells, indent=1) + "\n")
                write(cells, given.profile)


if __name__ == "__main__":
    main()
