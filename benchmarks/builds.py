"""One ``edgeship build`` of one artifact, and the figures of its report."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS = {
    "onnx": "iphone15pro",
    "tflite": "iphone15pro",
    "coreml": "iphone15pro",
    "coreai": "iphone15pro",
    "qnn": "galaxy-s24",
}


@dataclass(frozen=True)
class Built:
    """Figures by name, bytes on disk, the errors of the checks that fell short, and what the manifest says of weights."""

    figures: dict[str, Any]
    bytes: int
    error: str
    notes: tuple[str, ...] = ()
    weight_bytes: int = 0
    bits_per_weight: float = 0.0
    encodings: tuple[str, ...] = ()


def build(source: Sequence[str], runtime: str, options: Sequence[str] = (), keep: Path | None = None) -> Built:
    """Build, and read the report.

    Args:
        source: what to build with its data, as on the command line. options: everything else. keep: where the bundle
            goes; thrown away when None.
    """
    from edgeship.cli.main import cli
    from edgeship.errors import EdgeshipError

    error, out = "", io.StringIO()
    with tempfile.TemporaryDirectory() as temporary:
        place = keep or Path(temporary) / "bundle"
        command = [
            "build", *source, "--runtime", runtime, "--json", "-o", str(place),
            *(() if "--target" in options else ("--target", TARGETS[runtime])), *options,
        ]  # fmt: skip
        try:
            # In this process: importing torch and the converters takes longer than building a small model.
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
                cli.main(command, standalone_mode=False)
        except EdgeshipError as problem:
            error = str(problem)
        manifest = place / "manifest.json"
        record = json.loads(manifest.read_text())["artifacts"][0] if manifest.is_file() else {}
    text = out.getvalue().strip()
    report = json.loads(text) if text.startswith("{") else None
    if report is None or not report["rows"]:
        return Built({}, 0, error)
    row = report["rows"][0]
    figures = {item["name"]: item["value"] for verdict in row["verdicts"] for item in verdict["measurements"]}
    failed = [verdict["summary"] for verdict in row["verdicts"] if not verdict["passed"]]
    return Built(
        figures,
        row["size_bytes"],
        "; ".join(failed),
        tuple(report["notes"]),
        record.get("weight_bytes", 0),
        record.get("bits_per_weight", 0.0),
        tuple(sorted({item["encoding"] for item in record.get("encodings", {}).values()})),
    )


def sets(**options: Any) -> list[str]:
    """``--set compress/quantize.NAME=VALUE`` for each option."""
    return [item for name, value in options.items() for item in ("--set", f"compress/quantize.{name}={value}")]


@dataclass(frozen=True)
class Ran:
    """An ``edgeship build`` in a process of its own.

    Args:
        report: as printed by ``--json``; None when the build ended before. why: the line in which it ended then.
        code: its exit code; None when it took too long. seconds: of the whole process.
    """

    report: dict[str, Any] | None
    why: str
    code: int | None
    seconds: float


def run_build(arguments: Sequence[str], runtime: str, profile: str, output: Path, limit_seconds: float) -> Ran:
    """Build one artifact as a user does."""
    command = [
        str(Path(sys.executable).parent / "edgeship"), "build", *arguments, "--target", TARGETS[runtime],
        "--runtime", runtime, "--profile", profile, "-o", str(output), "--json",
    ]  # fmt: skip
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_seconds, check=False)
    except subprocess.TimeoutExpired:
        return Ran(None, f"took longer than {limit_seconds:g} s", None, limit_seconds)
    seconds = round(time.perf_counter() - begin, 1)
    report = json.loads(done.stdout) if done.stdout.strip().startswith("{") else None
    if report is not None and report["rows"]:
        return Ran(report, "", done.returncode, seconds)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    why = errors[-1].removeprefix("error: ") if errors else f"exit code {done.returncode}"
    return Ran(None, why, done.returncode, seconds)


def portable(text: str) -> str:
    """Without paths of the machine it ran on."""
    return re.sub(r"(/[\w.\-]+)+/", "", text)
