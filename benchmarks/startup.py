"""How fast the tool answers: help, and a rebuild from the cache against the first build. Writes docs/results/startup.md.

python benchmarks/startup.py
"""

from __future__ import annotations

import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edgeship.engine.gathering import machine

ROOT = Path(__file__).resolve().parents[1]
EDGESHIP = str(Path(sys.executable).parent / "edgeship")
RUNS = 11


def seconds(command: list[str], cache: str) -> float:
    """Wall time of one whole process."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "EDGESHIP_CACHE": cache})
    return time.perf_counter() - begin


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        cache, output = f"{temporary}/cache", f"{temporary}/bundle"
        seconds([EDGESHIP, "--help"], cache)
        helps = sorted(seconds([EDGESHIP, "--help"], cache) for _ in range(RUNS))
        build = [EDGESHIP, "build", str(ROOT / "samples" / "digits_cnn"), "-o", output]
        build += ["--target", "iphone15pro", "--target", "galaxy-s24"]
        first = seconds(build, cache)
        again = sorted(seconds(build, cache) for _ in range(3))
    about = machine()
    ratio = statistics.median(again) / first
    text = f"""# Start-up and rebuilds

Made by `python benchmarks/startup.py`, {datetime.date.today()}, on {about["processor"]}, {about["cores"]} cores,
{about["memory_gib"]} GiB, Python {about["python"]}. Whole processes, wall time.

| what | wanted | measured | met |
|---|---|---|---|
| `edgeship --help`, median of {RUNS} (min, max) | under 0.3 s | {statistics.median(helps):.3f} s ({helps[0]:.3f}, {helps[-1]:.3f}) | \
{"yes" if statistics.median(helps) < 0.3 else "no"} |
| first build of digits_cnn, five runtimes | - | {first:.1f} s | - |
| the same build from the cache, median of 3 | under 0.1 of the first | {statistics.median(again):.2f} s, {ratio:.3f} of it | \
{"yes" if ratio < 0.1 else "no"} |
"""
    (ROOT / "docs" / "results" / "startup.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
