"""ResNet-56 with half of its weights pruned, and 8 bits: accuracy and file of every artifact, dense beside sparse.

python benchmarks/sparse.py [--images 1000]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from builds import Built, build
from cifar import LIMITS
from models import SHARED, cifar_files
from results import write_page

HERE = Path(__file__).resolve().parent
RUNTIMES = ("onnx", "tflite", "coreml", "coreai")
WANTED = 0.015
# Schedule, whether the kept weights are refitted, and the runtimes it is run on.
CELLS: tuple[tuple[str, bool, tuple[str, ...]], ...] = (
    ("", False, RUNTIMES),
    ("measured", True, RUNTIMES),
    # Runtimes store the same numbers: one of them shows what another schedule loses.
    ("global", True, ("onnx",)),
    ("layer", True, ("onnx",)),
    ("global", False, ("onnx",)),
    ("layer", False, ("onnx",)),
    ("measured", False, ("onnx",)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    given = parser.parse_args()
    rows: list[list[str]] = []
    dense: dict[str, Built] = {}
    with tempfile.TemporaryDirectory() as temporary:
        calibration, evaluation = cifar_files(Path(temporary), evaluation=given.images)
        source = [
            str(SHARED / "models" / "resnet_cifar10" / "resnet56-4bfd9763.th"), "--factory",
            f"{HERE / 'models.py'}:resnet56", "--input", "image:f32[1,3,32,32]", "--calibration", str(calibration),
            "--eval", str(evaluation), "--max-drop", "100%", "--profile", "balanced",
        ]  # fmt: skip
        for schedule, refit, runtimes in CELLS:
            for runtime in runtimes:
                options = ["--set", f"check/accuracy.limit={min(LIMITS[runtime], given.images)}"]
                if schedule:
                    options += ["--set", "compress/prune.sparsity=0.5", "--set", f"compress/prune.scope={schedule}"]
                    options += ["--set", f"compress/prune.refit={str(refit).lower()}"]
                built = build(source, runtime, options)
                if "accuracy" not in built.figures:
                    raise SystemExit(f"{schedule} {runtime}: {built.error}")
                if not schedule:
                    dense[runtime] = built
                rows.append(_row(schedule, refit, runtime, built, dense[runtime]))
                print(rows[-1], flush=True)
                _write(rows, given.images)


def _row(schedule: str, refit: bool, runtime: str, built: Built, dense: Built) -> list[str]:
    original = built.figures["accuracy_original"]
    lost = original - built.figures["accuracy"]
    note = next((item for item in built.notes if "pruned layers" in item), "")
    return [
        f"50 %, {schedule}" if schedule else "dense",
        "yes" if refit else "",
        runtime,
        f"{built.figures['accuracy']:.2%}",
        f"{original:.2%}",
        f"{100 * lost:+.2f}",
        ("met" if lost <= WANTED + 1e-9 else "missed") if schedule == "measured" and refit else "",
        f"{built.bytes / 1e3:.1f} kB",
        f"{(dense.bytes - built.bytes) / 1e3:.1f} kB" if schedule else "",
        f"{(dense.weight_bytes - built.weight_bytes) / 1e3:.1f} kB" if schedule else "",
        f"{built.bits_per_weight:.2f}",
        note.partition("zero")[2].strip(",; "),
    ]


def _write(rows: list[list[str]], images: int) -> None:
    write_page(
        "sparse", "ResNet-56, half pruned, in 8 bits", "python benchmarks/sparse.py",
        ("edgeship", "torch", "onnxruntime", "coremltools", "coreai-core", "ai-edge-litert"),
        ("zeros", "refitted", "runtime", "accuracy", "float, same images", "points lost", "at most 1.5 lost", "file", "smaller than dense by", "zeros say", "bits per weight", "zeros in the file"),
        rows,
        before=f"CIFAR-10, {images} images (Core ML and Core AI {min(LIMITS['coreml'], images)} of them), 500 others to calibrate. Magnitude pruning, "
        "then 8-bit weights per channel. ``layer`` prunes each layer alike, ``global`` under one threshold relative to each layer's "
        "mean, ``measured`` as the outputs bear it. Nothing is trained: where it says refitted, the weights that stay are the least "
        "squares solution on 128 calibration images, one layer after the other (compress/prune.refit, planned where there is "
        "calibration data). ``zeros say`` is what the manifest's bytes of weights become less by: 8 bits for each weight that went, "
        "and one bit more for each weight, which says where they were. Operators that put the zeros back take room too.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
