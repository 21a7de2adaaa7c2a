"""What an app would see: decisions of trained models on real data, beside the original: docs/results/tasks.md.

    python benchmarks/tasks.py [--only TASK] [--runtime NAME] [--profile NAME]

Needs EDGESHIP_REAL_MODELS (see real_models.py), `espeak-ng` for speech, and photographs of the package scikit-image
unpacked in the same folder. The original is the maker's file in ONNX Runtime, or the torch module where there is none.
Every artifact answers the same inputs through its own engine, states fed back by itself. A row counts equal decisions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from builds import TARGETS, portable, run_build
from real_models import Crepe, folder, real_models

from edgeship.core.runtimes import as_numpy
from edgeship.engine.gathering import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
KEPT, PAGE = RESULTS / "tasks.json", RESULTS / "tasks.md"
PROFILES = ("exact", "balanced")
LIMIT_SECONDS = 900
Arrays = dict[str, np.ndarray]

INTRODUCTION = """# Tasks: the decisions of trained models

Made by `python benchmarks/tasks.py`, {date}, on {processor}, {cores} cores, {memory_gib} GiB, Python {python}.

Trained models as their makers ship them, on real data, beside the original (the maker's file in ONNX Runtime; crepe in
torch). A cell counts the decisions that are the original's. Voice activity: chunks of synthetic speech with pauses, the state
fed back from the artifact's own answers, above or below 0.5. Text: what a line of print reads, greedy CTC. Orientation:
upright or turned. Faces: boxes above 0.7 after suppression, matched above 0.9 overlap with scores within 0.05; a cell
counts images on which all boxes match. File types: the label of files. Pitch: the bin of 20 cents, within one.
No calibration data are given.
"""


@dataclass(frozen=True)
class Task:
    """One model on one kind of data.

    Args:
        model: name in `real_models`. samples: inputs by the maker's names, in order.
        decide: outputs in order -> the decision. same: whether two decisions are the same.
        states: the maker's names, output place -> input, fed back from one sample to the next.
        fixed: inputs that the build fixed, for the original alone.
    """

    model: str
    samples: Callable[[], Sequence[Arrays]]
    decide: Callable[[Sequence[np.ndarray]], Any]
    same: Callable[[Any, Any], bool] = lambda one, other: one == other
    states: Mapping[int, str] = field(default_factory=dict)
    fixed: Mapping[str, np.ndarray] = field(default_factory=dict)


TEXTS = (
    "Nothing ships unrun", "edgeship 0.1", "Total: 1,249.50 EUR", "Gate B42 boarding 18:35", "4-bit weights",
    "the quick brown fox", "INVOICE 2026-11-30", "on-device & offline", "Best before 03/27", "Room 101, Floor 7",
    "jumps over the lazy dog", "Speed limit 55", "No smoking", "Exit only", "Wi-Fi password: k8s-2n",
)  # fmt: skip
SPEECH = (
    "Nothing ships unrun. Every artifact is executed and compared before it is published. "
    "The budget is the input. Bytes, memory and accuracy limits pick the precision."
)


@cache
def speech() -> np.ndarray:
    """Synthetic speech at 16 kHz with silence and a little noise around it, in -1..1."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "speech.wav"
        subprocess.run(["espeak-ng", "-w", str(path), SPEECH], check=True)
        with wave.open(str(path)) as file:
            rate = file.getframerate()
            sound = np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32768
    places = np.arange(0, len(sound), rate / 16000)
    sound = np.interp(places, np.arange(len(sound)), sound)
    pause = np.zeros(16000)
    whole = np.concatenate([pause, sound[: len(sound) // 2], pause, sound[len(sound) // 2 :], pause])
    noise = 1e-3 * np.random.default_rng(0).standard_normal(len(whole))
    return (0.6 * whole + noise).astype(np.float32)


def chunks(count: int = 300) -> list[Arrays]:
    """Chunks of 512 samples with 64 before them, as silero-vad takes them."""
    sound = speech()
    padded = np.concatenate([np.zeros(64, np.float32), np.tile(sound, 2)])
    return [{"input": padded[None, 512 * place : 512 * place + 576]} for place in range(count)]


def print_line(text: str, width: int = 320, height: int = 48) -> np.ndarray:
    """A line of black print on white paper, ``[height, width, 3]`` bytes."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, height), (250, 250, 248))
    font = ImageFont.load_default(26)
    ImageDraw.Draw(image).text((6, 8), text, fill=(20, 20, 30), font=font)
    return np.asarray(image)


def lines() -> list[Arrays]:
    """Lines of print, (pixel / 255 - 0.5) / 0.5, ``[1, 3, 48, 320]``."""
    return [{"x": _normal(print_line(text), 127.5, 127.5)} for text in TEXTS]


def turned_lines() -> list[Arrays]:
    """Lines upright and upside down, ``[1, 3, 48, 192]``."""
    found = []
    for text in TEXTS:
        image = print_line(text[:14], 192)
        found += [{"x": _normal(item, 127.5, 127.5)} for item in (image, image[::-1, ::-1])]
    return found


def photographs() -> Iterator[np.ndarray]:
    """Photographs of the package scikit-image, ``[height, width, 3]`` bytes; some turned and cut."""
    from PIL import Image

    place = folder()
    assert place is not None
    for name in ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left", "retina"):
        path = next(iter(sorted((place / "scikit-image" / "skimage" / "data").glob(f"{name}.*"))), None)
        if path is None:
            continue
        image = np.asarray(Image.open(path).convert("RGB"))
        height, width = image.shape[:2]
        yield image
        yield image[:, ::-1]
        yield image[: 3 * height // 4, : 3 * width // 4]


def faces() -> list[Arrays]:
    """Photographs as UltraFace takes them: ``[1, 3, 240, 320]``, (pixel - 127) / 128."""
    from PIL import Image

    return [
        {"input": _normal(np.asarray(Image.fromarray(item).resize((320, 240))), 127, 128)} for item in photographs()
    ]


def files() -> list[Arrays]:
    """The first and last 1024 bytes of files of the project and its packages, as magika takes them."""
    place = folder()
    assert place is not None
    found = [
        *sorted((ROOT / "edgeship").rglob("*.py"))[:12], *sorted((ROOT / "docs").glob("*.md"))[:6],
        *sorted((ROOT / "targets").glob("*.toml"))[:4], ROOT / "Makefile", ROOT / "LICENSE",
        *sorted(place.rglob("*.onnx"))[:4], *sorted(place.rglob("*.png"))[:6], *sorted(place.rglob("*.json"))[:6],
        *sorted(place.rglob("*.jpg"))[:2], *sorted(place.rglob("*.npy"))[:1], *sorted(place.rglob("*.pth"))[:2],
    ]  # fmt: skip
    samples = []
    for path in found:
        content = path.read_bytes()
        begin, end = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
        ids = np.full(2048, 256, np.int32)
        ids[: len(begin)] = np.frombuffer(begin, np.uint8)
        ids[2048 - len(end) :] = np.frombuffer(end, np.uint8)
        samples.append({"bytes": ids[None]})
    return samples


def frames() -> list[Arrays]:
    """Frames of 1024 samples, each of mean 0 and spread 1: notes with overtones, speech, and silence."""
    time = np.arange(1024) / 16000
    found = []
    for frequency in np.geomspace(60, 1500, 40):
        tone = sum(np.sin(2 * np.pi * frequency * order * time) / order for order in range(1, 6))
        found.append(tone)
    sound = speech()
    found += [sound[place : place + 1024] for place in range(16000, 16000 + 40 * 2048, 2048)]
    found.append(np.zeros(1024))
    return [{"audio": _standard(item)[None]} for item in found]


def _standard(frame: np.ndarray) -> np.ndarray:
    frame = frame - frame.mean()
    return (frame / max(float(frame.std()), 1e-10)).astype(np.float32)


def _normal(image: np.ndarray, mean: float, std: float) -> np.ndarray:
    """``[H, W, 3]`` bytes to ``[1, 3, H, W]``."""
    return np.ascontiguousarray(((image.astype(np.float32) - mean) / std).transpose(2, 0, 1)[None])


def read_text(outputs: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Greedy CTC: the likeliest symbol of each step, repeats and blanks dropped."""
    best = outputs[0][0].argmax(-1)
    return tuple(int(item) for place, item in enumerate(best) if item and (place == 0 or item != best[place - 1]))


def boxes(outputs: Sequence[np.ndarray]) -> list[tuple[float, ...]]:
    """Boxes above 0.7, the best first, those that overlap a better one by more than 0.3 suppressed."""
    scores, places = outputs[0][0][:, 1], outputs[1][0]
    kept: list[tuple[float, ...]] = []
    for place in np.argsort(-scores, kind="stable"):
        if scores[place] < 0.7:
            break
        box = tuple(float(item) for item in (*places[place], scores[place]))
        if all(_overlap(box, other) < 0.3 for other in kept):
            kept.append(box)
    return kept


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    wide = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    high = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(item[2] - item[0]) * (item[3] - item[1]) for item in (one, other)]
    return wide * high / max(sum(areas) - wide * high, 1e-9)


def same_boxes(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> bool:
    """Whether each box has its own in the other list."""
    matched = [any(_overlap(box, item) > 0.9 and abs(box[4] - item[4]) < 0.05 for item in other) for box in one]
    return len(one) == len(other) and all(matched)


def likeliest(outputs: Sequence[np.ndarray]) -> int:
    """The place of the largest number."""
    return int(outputs[0].argmax())


TASKS = {
    "voice activity": Task(
        "silero-vad 16k", chunks, lambda outputs: bool(outputs[0].reshape(()) > 0.5), states={1: "state"},
        fixed={"sr": np.array(16000)},
    ),
    "text": Task("PP-OCR recogniser", lines, read_text),
    "orientation": Task("PP-OCR orientation", turned_lines, likeliest),
    "faces": Task("UltraFace", faces, boxes, same_boxes),
    "file types": Task("magika", files, likeliest),
    "pitch": Task("crepe tiny", frames, likeliest, lambda one, other: abs(one - other) <= 1),
}  # fmt: skip


def decisions(
    task: Task, run: Callable[[Arrays], Sequence[np.ndarray]], shapes: Mapping[str, tuple[int, ...]]
) -> list[Any]:
    """The decision on each sample; states begin as zeros and come back from ``run``'s own answers."""
    states = {name: np.zeros(shapes[name], np.float32) for name in task.states.values()}
    found = []
    for sample in task.samples():
        outputs = run({**sample, **states})
        states = {name: outputs[place] for place, name in task.states.items()}
        found.append(task.decide(outputs))
    return found


@cache
def original(name: str) -> list[Any]:
    """The decisions of the maker's file, or of the torch module."""
    task = TASKS[name]
    path = real_models()[task.model].arguments[0]
    if not path.endswith(".onnx"):
        import torch

        module = Crepe().eval()
        module.load_state_dict(torch.load(path, weights_only=True))

        def run(inputs: Arrays) -> Sequence[np.ndarray]:
            with torch.no_grad():
                return [module(torch.from_numpy(inputs["audio"])).numpy()]

        return decisions(task, run, {})
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    shapes = dict.fromkeys(task.states.values(), (2, 1, 128))
    return decisions(task, lambda inputs: session.run(None, {**inputs, **task.fixed}), shapes)


def cell(name: str, runtime: str, profile: str, place: Path) -> dict[str, Any]:
    """Build one artifact and let it decide."""
    from edgeship.core.registry import runtimes
    from edgeship.shipping.bundle import opened, read_bundle

    task = TASKS[name]
    ran = run_build(real_models()[task.model].arguments, runtime, profile, place, LIMIT_SECONDS)
    if ran.code != 0:
        short = [] if ran.report is None else ran.report["rows"][0]["verdicts"]
        return {"why": portable(next((item["summary"] for item in short if not item["passed"]), ran.why))[:300]}
    bundle = read_bundle(place)
    artifact = opened(bundle, bundle.manifest.artifacts[0])
    names = {spec.name: getattr(spec, "source", None) or spec.name for spec in artifact.signature.inputs}
    shapes = {names[spec.name]: spec.shape for spec in artifact.signature.inputs}
    with runtimes()[runtime].open(artifact) as session:

        def run(inputs: Arrays) -> Sequence[np.ndarray]:
            asked = {
                spec.name: as_numpy(inputs[names[spec.name]], spec.numpy_dtype) for spec in artifact.signature.inputs
            }
            answers = session.run(asked)
            return [answers[spec.name] for spec in artifact.signature.outputs]

        found = decisions(task, run, shapes)
    wanted = original(name)
    equal = sum(task.same(one, other) for one, other in zip(found, wanted, strict=True))
    return {"equal": equal, "of": len(wanted)}


def write(cells: dict[str, dict[str, dict[str, Any]]]) -> None:
    """A table a profile, then why builds ended."""
    rows = [INTRODUCTION.format(date=datetime.date.today(), **machine())]
    reasons = []
    for profile, tasks in cells.items():
        rows += [
            f"## {profile}",
            "",
            "| task | model | " + " | ".join(TARGETS) + " |",
            "|---|---|" + "---|" * len(TARGETS),
        ]
        for name, row in tasks.items():
            texts = [
                "not run" if found is None else f"{found['equal']} of {found['of']}" if "of" in found else "**none**"
                for found in (row.get(runtime) for runtime in TARGETS)
            ]
            rows.append(f"| {name} | {TASKS[name].model} | " + " | ".join(texts) + " |")
            reasons += [
                f"- **{name}, {key}, {profile}**: {found['why']}" for key, found in row.items() if "why" in found
            ]
        rows.append("")
    rows += ["## No artifact, and why", "", *(reasons or ["Every build passed."])]
    PAGE.write_text("\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(TASKS))
    parser.add_argument("--runtime", choices=sorted(TARGETS))
    parser.add_argument("--profile", action="append")
    parser.add_argument("--again", action="store_true", help="Run cells that are kept already.")
    given = parser.parse_args()
    cells: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    for profile in given.profile or PROFILES:
        for name, task in TASKS.items():
            if task.model not in real_models() or given.only not in (None, name):
                continue
            for runtime in TARGETS:
                row = cells.setdefault(profile, {}).setdefault(name, {})
                if given.runtime not in (None, runtime) or (runtime in row and not given.again):
                    continue
                with tempfile.TemporaryDirectory() as temporary:
                    row[runtime] = cell(name, runtime, profile, Path(temporary) / "bundle")
                print(f"{profile:9} {name:16} {runtime:8} {row[runtime]}", flush=True)
                KEPT.write_text(json.dumps(cells, indent=1) + "\n")
                write(cells)


if __name__ == "__main__":
    main()
