"""Digests of artifacts, so that a change of the code that should change no artifact can show that it changes none.

    python benchmarks/artifact_digests.py --write docs/results/artifact-digests.json    # before the work
    python benchmarks/artifact_digests.py --compare docs/results/artifact-digests.json  # after it

The samples, and ten small networks with seeded weights, on every runtime. A file's digest is the SHA-256 in the bundle's manifest.
What differs is printed file by file; so is what was built before and is refused now. Rows are kept as they are made: a run
that was cut off goes on where it stopped (``--only NAME`` takes one model).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from builds import TARGETS, run_build

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ROOT / "benchmarks" / "networks.py"
LIMIT_SECONDS = 900
# Factory of benchmarks/networks.py -> its input. Small: what is asked is which numbers are stored, not how fast they run.
SEEDED = {
    "mobilenet_v2": "image:f32[1,3,64,64]",
    "mobilenet_v3": "image:f32[1,3,64,64]",
    "resnet": "image:f32[1,3,64,64]",
    "densenet": "image:f32[1,3,64,64]",
    "yolo": "image:f32[1,3,64,64]",
    "unet": "image:f32[1,3,48,48]",
    "convnext": "image:f32[1,3,64,64]",
    "vit": "image:f32[1,3,128,128]",
    "tcn": "mel:f32[1,40,100]",
}
MINILM = (f"{ROOT / 'benchmarks' / 'models.py'}:minilm", "input_ids:i64[1,32]", "attention_mask:i64[1,32]")
# Profiles of a sample beside the runtimes that it is built for.
SAMPLES = {
    "digits_cnn": (("balanced", "fast", "small"), tuple(TARGETS)),
    "language_id": (("balanced",), tuple(TARGETS)),
    "storyteller": (("small",), tuple(TARGETS)),
}


@dataclass(frozen=True)
class Case:
    """One build: its name in the record, what it is built from, for which runtime, with which profile."""

    name: str
    source: tuple[str, ...]
    runtime: str
    profile: str

    @property
    def key(self) -> str:
        """As in the record."""
        return f"{self.name} {self.runtime} {self.profile}"


def cases() -> Iterator[Case]:
    """Every build, samples first."""
    for name, (profiles, runtimes) in SAMPLES.items():
        for profile in profiles:
            for runtime in runtimes:
                yield Case(name, (str(ROOT / "samples" / name),), runtime, profile)
    for name, spec in SEEDED.items():
        for runtime in TARGETS:
            yield Case(name, (f"{NETWORKS}:{name}", "--input", spec), runtime, "balanced")
    factory, *inputs = MINILM
    given = [text for spec in inputs for text in ("--input", spec)]
    for runtime in TARGETS:
        yield Case("minilm", (factory, *given), runtime, "balanced")


def digests(case: Case) -> dict[str, str]:
    """File of the bundle's artifact -> SHA-256; ``refused`` -> the reason where there is no artifact."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        ran = run_build(case.source, case.runtime, case.profile, bundle, LIMIT_SECONDS)
        manifest = bundle / "manifest.json"
        if not manifest.is_file():
            return {"refused": ran.why or f"exit code {ran.code}"}
        files = [item for artifact in json.loads(manifest.read_text())["artifacts"] for item in artifact["files"]]
        return {item["path"]: item["sha256"] for item in files}


def differences(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """One line for each file that is another, gone or new."""
    lines = []
    for key in sorted(before.keys() & after.keys()):
        for name in sorted(before[key].keys() | after[key].keys()):
            old, new = before[key].get(name), after[key].get(name)
            if old == new:
                continue
            what = "is new" if old is None else "is gone" if new is None else "is another"
            lines.append(f"{key}: {name} {what}")
    return lines


def main() -> None:
    """Write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="record to make or to complete")
    parser.add_argument("--compare", type=Path, help="record to compare with")
    parser.add_argument("--only", action="append", help="one model")
    given = parser.parse_args()
    record = given.write or Path(tempfile.gettempdir()) / "artifact-digests.json"
    made: dict[str, dict[str, str]] = json.loads(record.read_text()) if given.write and record.is_file() else {}
    for case in cases():
        if case.key in made or (given.only and case.name not in given.only):
            continue
        made[case.key] = digests(case)
        print(case.key, made[case.key].get("refused", f"{len(made[case.key])} files"), flush=True)
        record.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
    if given.compare is None:
        return
    before = json.loads(given.compare.read_text())
    lines = differences(before, made)
    print("\n".join(lines))
    print(f"{len(made)} builds compared, {len(lines)} files differ")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
