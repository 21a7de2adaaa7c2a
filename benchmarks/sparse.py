"""ResNet-56 with half of its weights pruned, and 8 bits: accuracy and file of every artifact, dense beside sparse.

python benchmarks/sparse.py [--images 1000]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from builds import build
from cifar import LIMITS
from models import SHARED, cifar_files
from results import write_page

HERE = Path(__file__).resolve().parent
RUNTIMES = ("onnx", "tflite", "coreml", "coreai")
WANTED = 0.015


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        calibration, evaluation = cifar_files(Path(temporary), evaluation=given.images)
        source = [
            str(SHARED / "models" / "resnet_cifar10" / "resnet56-4bfd9763.th"), "--factory",
            f"{HERE / 'models.py'}:resnet56", "--input", "image:f32[1,3,32,32]", "--calibration", str(calibration),
            "--eval", str(evaluation), "--max-drop", "100%", "--profile", "balanced",
        ]  # fmt: skip
        for schedule in ("measured", None, "global", "layer"):
            for runtime in RUNTIMES if schedule in (None, "measured") else ("onnx",):
                options = ["--set", f"check/accuracy.limit={min(LIMITS[runtime], given.images)}"]
                if schedule is not None:
                    options += ["--set", "compress/prune.sparsity=0.5", "--set", f"compress/prune.scope={schedule}"]
                    # Each layer and each share runs all of them.
                    options += ["--set", "compress/prune.samples=8"]
                built = build(source, runtime, options)
                if "accuracy" not in built.figures:
                    raise SystemExit(f"{schedule} {runtime}: {built.error}")
                lost = built.figures["accuracy_original"] - built.figures["accuracy"]
                met = "" if schedule != "measured" else ("met" if lost <= WANTED + 1e-9 else "missed")
                label = "dense" if schedule is None else f"50 %, {schedule}"
                accuracy = f"{built.figures['accuracy']:.2%}"
                original = f"{built.figures['accuracy_original']:.2%}"
                note = next((item for item in built.notes if "pruned layers" in item), "")
                stored = note.partition("zero")[2].strip(",; ")
                bits = f"{built.bits_per_weight:.2f}"
                rows.append(
                    [
                        label,
                        runtime,
                        accuracy,
                        original,
                        f"{100 * lost:+.2f}",
                        met,
                        f"{built.bytes / 1e3:.1f} kB",
                        bits,
                        stored,
                    ]
                )
                print(rows[-1], flush=True)
                _write(rows, given.images)


def _write(rows: list[list[str]], images: int) -> None:
    write_page(
        "sparse", "ResNet-56, half pruned, in 8 bits", "python benchmarks/sparse.py",
        ("edgeship", "torch", "onnxruntime", "coremltools", "coreai-core", "ai-edge-litert"),
        ("zeros", "runtime", "accuracy", "float, same images", "points lost", "at most 1.5 lost", "file", "bits per weight", "zeros in the file"),
        rows,
        before=f"CIFAR-10, {images} images. Magnitude pruning without healing, then 8-bit weights per channel. "
        "``layer`` prunes each layer alike, ``global`` under one threshold, ``measured`` as the outputs bear it.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
