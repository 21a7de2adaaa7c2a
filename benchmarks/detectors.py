"""Detectors whole, each for five runtimes and three profiles: docs/results/detectors.md.

    python benchmarks/detectors.py [--only NAME ...] [--runtime NAME ...] [--profile NAME ...] [--minutes N] [--again]

Wants an environment with torchvision, ultralytics and transformers; a detector whose package is not there is left out.
Weights are random. Batch norms remember the statistics of photographs, and the layers that make scores are scaled until a
few scores stand out, as a trained network's do: with scores that all nearly tie there is nothing to compare. Each cell is
one build in a process of its own; then the artifact and the module itself look at photographs that were not calibrated
on, and detections are paired: one of the same class whose box overlaps by more than half. Cells are kept in
docs/results/detectors.json with their date and the tree that they were made from.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from builds import TARGETS, portable
from results import RESULTS, write_page

KEPT = RESULTS / "detectors.json"
PROFILES = ("exact", "balanced", "fast")
LIMIT_SECONDS = 2400
# Photographs that calibration sees, and others that artifacts are compared on.
CALIBRATED, COMPARED = 24, 6
# Scores of what stands out, and the spread of the logits before them.
SPREAD = 3.0
SAME_BOX = 0.5
CONFIDENT = 0.3
COLUMNS = ("detector", "package", "input", "profile", *TARGETS)
BEFORE = """Each cell: **equal/of**, how many of the module's detections on photographs the artifact has too (same class, boxes
that overlap by more than half), **+n** for those that only the artifact has; and the seconds of the build with its checks.
**short**: a check held the artifact back; **refused**: no artifact was made; both with their reason below."""


@dataclass(frozen=True)
class Detector:
    """A detector as its package makes it.

    Args:
        package: whose module. make: the module and the layers that make its scores. size: of the square input.
        found: a module's answer, as arrays by name, as rows ``[N, 6]``: four corners, score, class.
        largest: scales the images' values.
    """

    package: str
    make: Callable[[], tuple[nn.Module, list[nn.Module]]]
    size: int
    found: Callable[[dict[str, np.ndarray]], np.ndarray]


class OneImage(nn.Module):
    """A detector of torchvision for a batch of one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """[1, 3, H, W]."""
        return dict(self.model([image[0]])[0])


def ssdlite() -> tuple[nn.Module, list[nn.Module]]:
    made = import_module("torchvision.models.detection").ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=21, score_thresh=CONFIDENT
    )
    return OneImage(made), [part[-1] for part in made.head.classification_head.module_list]


def faster_rcnn() -> tuple[nn.Module, list[nn.Module]]:
    made = import_module("torchvision.models.detection").fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=21, box_score_thresh=CONFIDENT, min_size=192, max_size=192
    )
    return OneImage(made), [made.rpn.head.cls_logits, made.roi_heads.box_predictor.cls_score]


def _yolo(name: str) -> tuple[nn.Module, list[nn.Module]]:
    made = import_module("ultralytics").YOLO(f"{name}.yaml").model
    head = made.model[-1]
    head.export, head.format = True, "onnx"
    branches = [part for key in ("cv3", "one2one_cv3") for part in getattr(head, key, None) or ()]
    return made, [branch[-1] for branch in branches]


def yolo_with_suppression() -> tuple[nn.Module, list[nn.Module]]:
    made, scoring = _yolo("yolo11n")
    said = SimpleNamespace(
        format="onnx", dynamic=False, batch=1, max_det=100, conf=CONFIDENT, iou=0.7, agnostic_nms=False, opset=20,
        quantize=None,
    )  # fmt: skip
    made.task = "detect"
    return import_module("ultralytics.engine.exporter").NMSModel(made, said), scoring


class Queries(nn.Module):
    """DETR's answer as its processor reads it: the best class of each query, boxes as corners, the best 20."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """[1, 3, H, W]."""
        answer = self.model(pixel_values=image)
        # [1, queries, classes] -> [queries] twice
        scores, classes = answer.logits[0].softmax(-1)[:, :-1].max(-1)
        middle, size = answer.pred_boxes[0].split(2, -1)
        boxes = torch.cat([middle - size / 2, middle + size / 2], -1) * image.shape[-1]
        best, places = scores.topk(20)
        return {"boxes": boxes[places], "scores": best, "labels": classes[places]}


def detr() -> tuple[nn.Module, list[nn.Module]]:
    transformers = import_module("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, num_queries=50,
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, num_labels=20,
    )  # fmt: skip
    made = transformers.DetrForObjectDetection(config)
    return Queries(made), [made.class_labels_classifier]


def by_name(answer: dict[str, np.ndarray]) -> np.ndarray:
    """Rows ``[N, 6]`` of three arrays, as many as count."""
    count = int(answer["count"][0]) if "count" in answer else len(answer["scores"])
    parts = (answer["boxes"], answer["scores"][:, None], answer["labels"][:, None])
    return np.concatenate([part[:count].astype(np.float64) for part in parts], 1)


def in_one(answer: dict[str, np.ndarray]) -> np.ndarray:
    """Rows ``[N, 6]`` of ``[1, N, 6]``, those with a score that counts."""
    rows = next(iter(answer.values()))[0].astype(np.float64)
    return rows[rows[:, 4] > CONFIDENT]


def every_anchor(answer: dict[str, np.ndarray]) -> np.ndarray:
    """Rows ``[N, 6]`` of boxes by centre and scores of 80 classes ``[1, 84, A]``: every anchor with a score that counts."""
    values = next(iter(answer.values()))[0].astype(np.float64)
    boxes, scores = values[:4].T, values[4:].T
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    rows = np.concatenate([corners, scores.max(1)[:, None], scores.argmax(1)[:, None]], 1)
    return rows[rows[:, 4] > CONFIDENT]


DETECTORS: dict[str, Detector] = {
    "DETR, small": Detector("transformers", detr, 96, by_name),
    "YOLO11n": Detector("ultralytics", lambda: _yolo("yolo11n"), 160, every_anchor),
    "YOLO11n with NMS": Detector("ultralytics", yolo_with_suppression, 160, in_one),
    "YOLOv10n (top-k)": Detector("ultralytics", lambda: _yolo("yolov10n"), 160, in_one),
    "SSDLite320": Detector("torchvision", ssdlite, 320, by_name),
    "Faster R-CNN MobileNetV3": Detector("torchvision", faster_rcnn, 192, by_name),
}


def photographs(size: int) -> np.ndarray:
    """Photographs of the packages scikit-image and ultralytics, cut in parts, ``[N, 3, size, size]``, 0 to 1."""
    from PIL import Image
    from tasks import photographs as whole

    images = list(whole())
    parts = []
    for image in images:
        height, width = image.shape[:2]
        edge = min(height, width) * 2 // 3
        for top, left in ((0, 0), (height - edge, width - edge)):
            cut = Image.fromarray(np.ascontiguousarray(image[top : top + edge, left : left + edge]))
            parts.append(np.asarray(cut.resize((size, size)), np.float32) / 255)
    # [N, size, size, 3] -> [N, 3, size, size]
    return np.ascontiguousarray(np.stack(parts).transpose(0, 3, 1, 2))


def ready(name: str) -> tuple[nn.Module, np.ndarray]:
    """A detector for inference, always the same, whose best scores stand out; and photographs."""
    torch.manual_seed(0)
    detector = DETECTORS[name]
    model, scoring = detector.make()
    images = photographs(detector.size)
    model.eval()
    for weight in model.parameters():
        weight.requires_grad_(False)
    _remember(model, images)
    for layer in scoring:
        _stand_out(model, layer, images)
    return model.eval(), images


def _remember(model: nn.Module, images: np.ndarray) -> None:
    """Statistics of photographs in the batch norms."""
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None
            norm.reset_running_stats()
            norm.train()
        for image in images[:CALIBRATED:4]:
            model(torch.from_numpy(image[None]))
        for norm in norms:
            norm.eval()


def _stand_out(model: nn.Module, layer: nn.Module, images: np.ndarray) -> None:
    """Scale a layer of logits to a spread that decides, and move it so that few are above a half."""
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _, given, made: seen.append(made.detach().double().flatten()))
    with torch.no_grad():
        for image in images[:CALIBRATED:6]:
            model(torch.from_numpy(image[None]))
        handle.remove()
        values = torch.cat(seen)
        layer.weight.mul_(SPREAD / float(values.std().clamp_min(1e-9)))
        if layer.bias is not None:
            layer.bias.sub_(layer.bias.mean() + SPREAD)


def overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Intersection over union of corners: ``[N, 4], [M, 4] -> [N, M]``."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), -1)
    areas = [np.prod(np.clip(item[:, 2:] - item[:, :2], 0, None), -1) for item in (one, other)]
    return shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-9)


def paired(wanted: np.ndarray, found: np.ndarray) -> int:
    """How many detections both have, each once. Rows ``[N, 6]``."""
    if not len(wanted) or not len(found):
        return 0
    shares = overlap(wanted[:, :4], found[:, :4])
    # A box of no size is itself.
    shares = np.where(np.abs(wanted[:, None, :4] - found[None, :, :4]).max(-1) < 0.5, 1.0, shares)
    shares = np.where(wanted[:, None, 5] == found[None, :, 5], shares, 0.0)
    count = 0
    while shares.size and shares.max() > SAME_BOX:
        row, place = np.unravel_index(int(shares.argmax()), shares.shape)
        shares[row], shares[:, place] = 0.0, 0.0
        count += 1
    return count


def answers(model: nn.Module, images: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """What the module answers to each image, by name."""
    for image in images:
        with torch.no_grad():
            answer = model(torch.from_numpy(image[None]))
        named = (
            answer
            if isinstance(answer, dict)
            else {"output": answer[0] if isinstance(answer, (tuple, list)) else answer}
        )
        yield {name: value.numpy() for name, value in named.items()}


def compared(detector: Detector, model: nn.Module, images: np.ndarray, artifact: Any) -> list[int]:
    """Detections of the module, those that the artifact has too, and those that it has."""
    total = [0, 0, 0]
    with artifact.open() as network:
        for image, answer in zip(images, answers(model, images), strict=True):
            wanted = detector.found(answer)
            found = detector.found(dict(network.run({network.inputs[0].name: image[None]})))
            for place, value in enumerate((len(wanted), paired(wanted, found), len(found))):
                total[place] += value
    return total


def build(name: str, runtime: str, profile: str) -> dict[str, Any]:
    """One artifact: what its detections are, or why there is none."""
    import edgeship

    detector = DETECTORS[name]
    model, images = ready(name)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        bundle = edgeship.build(
            model, {"image": torch.from_numpy(images[:1])}, target=TARGETS[runtime], runtime=runtime, profile=profile,
            calibration=images[:CALIBRATED], output=Path(temporary) / "bundle",
        )  # fmt: skip
        cell: dict[str, Any] = {"seconds": round(time.perf_counter() - begin)}
        for refusal in bundle.report.refused:
            cell["refused"] = refusal.reason
        for row in bundle.report.rows:
            figures = {key: row.figure(key) for key in ("lowering_snr", "total_snr", "rows_agreed", "rows_kept")}
            cell |= {key: item.value for key, item in figures.items() if item is not None}
            cell |= {f"{key}_of": item.unit for key, item in figures.items() if item is not None and key[:4] == "rows"}
            if row.passed:
                cell["detections"] = compared(detector, model, images[-COMPARED:], bundle[row.runtime])
            else:
                cell["short"] = "; ".join(verdict.summary for verdict in row.verdicts if not verdict.passed)
    return cell


def in_process(name: str, runtime: str, profile: str) -> dict[str, Any]:
    """`build` in a process of its own; what ended it is the reason."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "cell.json"
        command = [sys.executable, __file__, "--one", name, "--runtime", runtime, "--profile", profile]
        command += ["--to", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return {"refused": f"took longer than {LIMIT_SECONDS} s", "seconds": LIMIT_SECONDS}
        seconds = round(time.perf_counter() - begin)
        if place.is_file():
            return dict(json.loads(place.read_text(encoding="utf-8")))
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"refused": last.partition("Error: ")[2] or last, "seconds": seconds}


def tree() -> str:
    """The commit that the package is at."""
    folder = Path(__file__).resolve().parent
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()  # fmt: skip


def _text(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "not run"
    seconds = f"{cell['seconds']} s"
    if "refused" in cell:
        return f"**refused**, {seconds}"
    if "short" in cell:
        return f"**short**, {seconds}"
    wanted, same, found = cell["detections"]
    more = f" +{found - same}" if found > same else ""
    return f"{same}/{wanted}{more}, {seconds}"


def write(kept: dict[str, dict[str, dict[str, Any]]]) -> None:
    """The page of what is kept: failures first."""
    rows, reasons, trees = [], [], set()
    for name, detector in DETECTORS.items():
        for profile in PROFILES:
            cells = kept.get(name, {}).get(profile, {})
            size = f"3x{detector.size}x{detector.size}"
            rows.append((name, detector.package, size, profile, *(_text(cells.get(runtime)) for runtime in TARGETS)))
            for runtime, cell in cells.items():
                trees.add(f"{cell['tree']} ({cell['date']})")
                why = cell.get("refused") or cell.get("short")
                if why:
                    reasons.append(f"- **{name}, {runtime}, {profile}**: {portable(why)[:400]}")
    missing = "\n".join(["## What has no artifact, and why", "", *(reasons or ["Every cell that was run passes."])])
    tools = ("torch", "torchvision", "ultralytics", "transformers", "onnxruntime", "coremltools", "coreai-torch",
        "litert-torch", "onnxruntime-qnn")  # fmt: skip
    write_page(
        "detectors", "Detectors whole", "python benchmarks/detectors.py", tools, COLUMNS, rows,
        f"{BEFORE}\n\nTrees: {', '.join(sorted(trees)) or 'none'}.\n\n{missing}",
    )  # fmt: skip


def _left(kept: dict[str, Any], given: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    for profile in given.profile or PROFILES:
        for name in given.only or list(DETECTORS):
            if find_spec(DETECTORS[name].package) is None:
                print(f"{name}: {DETECTORS[name].package} is not installed", flush=True)
                continue
            for runtime in given.runtime or list(TARGETS):
                if given.again or runtime not in kept.get(name, {}).get(profile, {}):
                    yield name, profile, runtime


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(DETECTORS))
    parser.add_argument("--runtime", action="append", choices=list(TARGETS))
    parser.add_argument("--profile", action="append", choices=PROFILES)
    parser.add_argument("--minutes", type=float, default=240.0, help="nothing is begun after that")
    parser.add_argument("--again", action="store_true", help="build what is kept already, too")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        given.to.write_text(json.dumps(build(given.one, given.runtime[0], given.profile[0])), encoding="utf-8")
        return
    kept: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    begin = time.perf_counter()
    for name, profile, runtime in [] if given.page else _left(kept, given):
        if time.perf_counter() - begin > given.minutes * 60:
            print("no time left", flush=True)
            break
        cell = {**in_process(name, runtime, profile), "date": datetime.date.today().isoformat(), "tree": tree()}
        kept.setdefault(name, {}).setdefault(profile, {})[runtime] = cell
        print(name, profile, runtime, _text(cell), cell.get("refused") or cell.get("short") or "", flush=True)
        KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    write(kept)


if __name__ == "__main__":
    main()
