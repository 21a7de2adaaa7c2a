"""One ``edgeship build`` of one artifact, and the figures of its report."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
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
