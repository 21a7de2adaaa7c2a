"""Suppression beside torchvision's, on 1000 sets of boxes in each runtime: docs/results/nms.md.

    python benchmarks/nms.py [--runtime NAME] [--sets N]

A module that calls ``torchvision.ops.nms`` is built once for each number of boxes, then asked set after set; every
index and the count must be those of torchvision (where it is not installed, of a greedy loop that rounds as its kernel
does). Numbers stay in docs/results/nms.json, so that runtimes can be run one by one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
from results import RESULTS, write_page  # noqa: E402  beside this file

KEPT = RESULTS / "nms.json"
TARGETS = {"onnx": "linux-x86", "tflite": "linux-x86", "coreml": "iphone15pro", "coreai": "iphone15pro",
           "qnn": "galaxy-s24"}  # fmt: skip
# Number of boxes and threshold of each artifact.
ARTIFACTS = ((16, 0.5), (64, 0.3), (150, 0.7), (300, 0.45))
SETS = 1000
Made = tuple[np.ndarray, np.ndarray]
Draw = Callable[[np.random.Generator, int], Made]


def _corners(low: np.ndarray, size: np.ndarray) -> np.ndarray:
    return np.concatenate([low, low + size], 1).astype(np.float32)


def anywhere(generator: np.random.Generator, count: int) -> Made:
    """Boxes of an image, scores of a sigmoid."""
    low, size = generator.random((count, 2)) * 560, generator.random((count, 2)) * 120
    return _corners(low, size), generator.random(count).astype(np.float32)


def ties(generator: np.random.Generator, count: int) -> Made:
    """Whole corners in a small square and four scores: shares at the threshold itself, many equal scores."""
    low, size = generator.integers(0, 20, (count, 2)), generator.integers(1, 12, (count, 2))
    return _corners(low, size), (generator.integers(0, 4, count) / 4).astype(np.float32)


def duplicates(generator: np.random.Generator, count: int) -> Made:
    """A few boxes many times, with equal and with other scores."""
    low, size = generator.random((5, 2)) * 300, generator.random((5, 2)) * 90 + 1
    chosen = generator.integers(0, 5, count)
    return _corners(low, size)[chosen], (generator.integers(0, 9, count) / 9).astype(np.float32)


def without_area(generator: np.random.Generator, count: int) -> Made:
    """Points and lines among boxes."""
    low, size = generator.integers(0, 9, (count, 2)), generator.integers(0, 3, (count, 2))
    return _corners(low, size), generator.random(count).astype(np.float32)


def all_suppressed(generator: np.random.Generator, count: int) -> Made:
    """One box hides all others."""
    low = generator.random((count, 2)) * 2
    return _corners(low, np.full((count, 2), 100.0)), generator.permutation(count).astype(np.float32) / count


def chain(generator: np.random.Generator, count: int) -> Made:
    """Each box overlaps the next alone, and scores fall along the chain: every decision hangs on the one before."""
    start = np.arange(count)[:, None] * np.array([[1.0, 0.0]])
    scores = np.linspace(1, 0.01, count).astype(np.float32)
    return _corners(start, np.full((count, 2), [1.0 + generator.random() * 2, 10.0])), scores


def upside_down(generator: np.random.Generator, count: int) -> Made:
    """Corners in any order, and scores below 0."""
    return generator.normal(0, 20, (count, 4)).astype(np.float32), generator.normal(0, 3, count).astype(np.float32)


def nested(generator: np.random.Generator, count: int) -> Made:
    """Boxes inside boxes, in classes that an offset keeps apart."""
    size = generator.random((count, 1)) * 200 * np.ones((1, 2))
    low = np.full((count, 2), 200.0) - size / 2 + generator.integers(0, 3, (count, 1)) * 4096
    return _corners(low, size), generator.random(count).astype(np.float32)


KINDS: dict[str, Draw] = {
    item.__name__.replace("_", " "): item
    for item in (anywhere, ties, duplicates, without_area, all_suppressed, chain, upside_down, nested)
}


def model_of(threshold: float) -> Any:
    """A module that calls the operator, and returns what it keeps."""
    import torch

    if importlib.util.find_spec("torchvision") is not None:
        from torchvision.ops import nms
    else:
        from vision_operators import nms

    class Suppression(torch.nn.Module):
        def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            """[N, 4] and [N] -> [kept]."""
            kept: torch.Tensor = nms(boxes, scores, threshold)
            return kept

    return Suppression()


def compared(runtime: str, sets: int) -> dict[str, Any]:
    """How many sets of each kind a runtime answers as torchvision does."""
    import torch

    import edgeship

    found: dict[str, list[int]] = {name: [0, 0] for name in KINDS}
    seconds = 0.0
    for place, (count, threshold) in enumerate(ARTIFACTS):
        model = model_of(threshold)
        inputs = {"boxes": f"f32[{count},4]", "scores": f"f32[{count}]"}
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            bundle = edgeship.build(
                model, inputs, target=TARGETS[runtime], runtime=runtime, profile="exact", output=Path(folder) / "out"
            )
            seconds += time.monotonic() - start
            with bundle[runtime].open() as session:
                for number in range(sets // len(ARTIFACTS)):
                    generator = np.random.default_rng(10_000 * place + number)
                    kind = list(KINDS)[number % len(KINDS)]
                    boxes, scores = KINDS[kind](generator, count)
                    wanted = model(torch.from_numpy(boxes), torch.from_numpy(scores)).numpy()
                    answer = session.run({"boxes": boxes, "scores": scores})
                    kept = answer["output"][: int(answer["count"][0])]
                    found[kind][0] += bool(np.array_equal(kept, wanted))
                    found[kind][1] += 1
    return {"kinds": found, "build_seconds": round(seconds)}


def main() -> None:
    """Run what is asked for, and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runtime", choices=TARGETS)
    parser.add_argument("--sets", type=int, default=SETS)
    asked = parser.parse_args()
    kept: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    oracle = "torchvision" if importlib.util.find_spec("torchvision") is not None else ""
    for runtime in [asked.runtime] if asked.runtime else TARGETS:
        try:
            kept[runtime] = {**compared(runtime, asked.sets), "oracle": oracle or "a greedy loop"}
        except edgeship_errors() as error:
            kept[runtime] = {"refused": str(error)}
        KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    columns = ["sets", *(name for name in TARGETS if name in kept)]
    rows = [[kind, *(_cell(kept[name], kind) for name in columns[1:])] for kind in KINDS]
    rows.append(["all", *(_cell(kept[name], "") for name in columns[1:])])
    write_page(
        "nms",
        "Suppression beside torchvision's",
        "python benchmarks/nms.py",
        ["torch", *([oracle] if oracle else []), "onnxruntime", "ai-edge-litert", "coremltools", "coreai-core"],
        columns,
        rows,
        before="Sets whose kept boxes, in their order, and whose count are those of torchvision, of how many were "
        "asked. Artifacts of profile `exact` for "
        + ", ".join(f"{count} boxes at {threshold:g}" for count, threshold in ARTIFACTS)
        + "; each is built once and asked set after set, Core ML by edgeship's evaluator, Hexagon by its emulator.",
        after="Hexagon has no float32: boxes, scores and shares are rounded to float16 before they are compared, and "
        "nearly equal ones are answered in another order or otherwise.",
    )


def _cell(found: dict[str, Any], kind: str) -> str:
    if "refused" in found:
        return "refused"
    pairs = [found["kinds"][kind]] if kind else found["kinds"].values()
    return f"{sum(pair[0] for pair in pairs)} of {sum(pair[1] for pair in pairs)}"


def edgeship_errors() -> type[Exception]:
    """What a build may raise on purpose."""
    from edgeship.errors import EdgeshipError

    return EdgeshipError


if __name__ == "__main__":
    main()
