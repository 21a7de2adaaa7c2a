"""Bits chosen layer by layer beside one width for all, at the same bytes; and whether smaller files really are.

python benchmarks/budget.py [--part auto|files] [--model NAME]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from builds import Built, build, sets
from encoder import source as minilm_source
from language import tinystories
from models import cifar_files, cifar_source
from results import RESULTS, write_page

GROUPED = {"bits": 4, "granularity": "group", "group_size": 32}
# Samples that losses are measured on: each layer and each encoding runs all of them.
FEW = ["--set", "compress/sensitivity.samples=6"]
# All of CIFAR-10's test images but those for calibration: a tenth of a point is 9 of them.
IMAGES = 9500
KNOWN = RESULTS / "budget.json"
PACKAGES = ("edgeship", "torch", "scipy", "onnxruntime", "coremltools", "ai-edge-litert", "coreai-core")


def sources(folder: Path) -> dict[str, tuple[list[str], str, list[str]]]:
    """Model -> its source with data, its metric, and the options of uniform 4 bits."""
    # Each writes its data under the same names.
    images, text, place = (folder / name for name in ("images", "text", "minilm"))
    for part in (images, text, place):
        part.mkdir()
    calibration, evaluation = cifar_files(images, evaluation=IMAGES)
    found: dict[str, tuple[list[str], str, list[str]]] = {}
    found["tinystories-llama-5m"] = (tinystories(text)[0], "perplexity", sets(**GROUPED, method="gptq"))
    found["all-MiniLM-L6-v2"] = (minilm_source(place, 500), "cosine", sets(**GROUPED, method="gptq"))
    for depth in (20, 56):
        gate = ["--max-drop", "100%", "--set", f"check/accuracy.limit={IMAGES}"]
        arguments = [*cifar_source(depth, calibration, evaluation), *gate]
        found[f"ResNet-{depth}"] = (arguments, "accuracy", sets(bits=4, method="gptq"))
    return found


def auto(found: dict[str, tuple[list[str], str, list[str]]], only: str | None) -> None:
    """The same bytes, spent two ways. What is known already (budget.json) is kept."""
    for model, (arguments, metric, uniform) in found.items():
        if only not in (None, model):
            continue
        same = build(arguments, "onnx", ["--profile", "balanced", *uniform])
        chosen = build(arguments, "onnx", ["--profile", "auto", "--max-size", f"{same.bytes}B"])
        for label, built in (("uniform 4 bits", same), ("auto", chosen)):
            if metric not in built.figures:
                raise SystemExit(f"{model} {label}: {built.error}")
        rows = [_row(model, "uniform 4 bits", metric, same, same), _row(model, "auto", metric, chosen, same)]
        # Another process may have written its model meanwhile.
        known: dict[str, Any] = json.loads(KNOWN.read_text()) if KNOWN.is_file() else {}
        known[model] = {"rows": rows, "curve": _curve(chosen), "encodings": list(chosen.encodings)}
        KNOWN.write_text(json.dumps(known, indent=1) + "\n")
        _write_auto([known[name] for name in found if name in known])


def _curve(built: Built) -> str:
    """The trade-off that the report prints, with whether its loss ever rises."""
    note = next(note for note in built.notes if "of the best choices: " in note)
    points = note.partition("of the best choices: ")[2].partition(";")[0].split(", ")
    losses = [float(point.rsplit(" ", 1)[1]) for point in points]
    monotone = "monotone" if losses == sorted(losses, reverse=True) else "NOT monotone"
    return f"{monotone}: {', '.join(points)}"


def _write_auto(known: list[dict[str, Any]]) -> None:
    curves = [f"- {item['rows'][0][0]} ({', '.join(item['encodings'])}): {item['curve']}" for item in known]
    write_page(
        "budget", "Bits chosen layer by layer, at the bytes of uniform 4-bit", "python benchmarks/budget.py --part auto",
        PACKAGES, ("model", "weights", "metric", "float", "stored", "drop", "outputs", "file", "less loss"),
        [row for item in known for row in item["rows"]],
        before="ONNX artifacts; the metric is taken on the file. ``auto`` is given the uniform file's bytes as --max-size. "
        f"Both round with GPTQ. ResNets: {IMAGES} images that calibration did not see. *outputs* is signal over noise "
        "of 16 answers, in dB.",
        after="Encodings of auto, and the curves that its reports print (bytes of weights and loss, noise over signal):\n\n"
        + "\n".join(curves)
        + "\n\nFor a network of 0.16 MB the graph decides: mixed widths take 1.5 kB more of it than one width for all, which "
        "the size gate takes from the weights (133.5 kB of 135.6 in ResNet-20: one layer goes to 2 bits), and one image of "
        "9500 more or less says nothing. In files of megabytes a kilobyte of graph does not matter.",
    )  # fmt: skip


def _row(model: str, label: str, metric: str, built: Built, same: Built) -> list[str]:
    value, original, drop = (built.figures[f"{metric}{end}"] for end in ("", "_original", "_drop"))
    less = "" if built is same else ("met" if drop < same.figures[f"{metric}_drop"] else "missed")
    return [
        model,
        label,
        metric,
        f"{original:.4f}",
        f"{value:.4f}",
        f"{drop:+.3%}",
        f"{built.figures['total_snr']:.1f} dB",
        f"{built.bytes / 1e6:.3f} MB",
        less,
    ]


def files(found: dict[str, tuple[list[str], str, list[str]]]) -> None:
    """Float16 files and smaller ones: file bytes beside what the report says of bits.

    ONNX by --max-size, a quarter, a half and three quarters less; the others in 8 and 4 bits, which is quicker.
    """
    rows: list[list[str]] = []
    arguments: list[str] = found["tinystories-llama-5m"][0]
    # Bytes are what is looked at: rounding with calibration data would take longer and store the same.
    quiet: list[str] = ["--set", "check/accuracy.limit=1", *sets(method="clipped")]
    for runtime in ("onnx", "tflite", "coreml", "coreai"):
        half = build(arguments, runtime, ["--profile", "exact", "--set", "check/accuracy.limit=1"])
        asked = {"8 bits": ["--profile", "balanced"], "4 bits": ["--profile", "balanced", *sets(bits=4)]}
        if runtime == "onnx":
            asked = {
                f"{less}% smaller": ["--profile", "auto", "--max-size", f"{half.bytes * (100 - less) // 100}B", *FEW]
                for less in (25, 50, 75)
            }
        rows.append(_file_row(runtime, "float16", half, half))
        for label, options in asked.items():
            rows.append(_file_row(runtime, label, build(arguments, runtime, [*options, *quiet]), half))
            print(rows[-1], flush=True)
            _write_files(rows)


def _write_files(rows: list[list[str]]) -> None:
    write_page(
        "file-sizes", "Smaller files", "python benchmarks/budget.py --part files", PACKAGES,
        ("runtime", "asked for", "file", "of float16", "bits per weight", "weights say", "difference", "within 2 %", "graph"), rows,
        before="tinystories-llama-5m; ONNX with profile auto. ``weights say`` is parameters times the bits per weight that the "
        "manifest states; ``graph`` is what the rest of the file takes, whatever the weights are stored in.",
    )  # fmt: skip


def _file_row(runtime: str, label: str, built: Built, half: Built) -> list[str]:
    if not built.weight_bytes:
        return [runtime, label, built.error, *[""] * 6]
    off = built.bytes / built.weight_bytes - 1
    return [
        runtime, label, f"{built.bytes / 1e6:.3f} MB", f"{built.bytes / half.bytes:.1%}", f"{built.bits_per_weight:.3f}",
        f"{built.weight_bytes / 1e6:.3f} MB", f"{off:+.2%}", "met" if abs(off) <= 0.02 else "missed",
        f"{(built.bytes - built.weight_bytes) / 1e3:.0f} kB",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["auto", "files"])
    parser.add_argument("--model", help="only this one, of part auto")
    given = parser.parse_args()
    parts: dict[str, Any] = {"auto": lambda found: auto(found, given.model), "files": files}
    with tempfile.TemporaryDirectory() as temporary:
        found = sources(Path(temporary))
        for name, part in parts.items():
            if given.part in (None, name):
                part(found)


if __name__ == "__main__":
    main()
