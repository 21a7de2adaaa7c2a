"""Profile ``fast`` beside ``balanced`` and beside the runtimes' own quantizers: ``python benchmarks/fast.py [NAME ...]``.

Ten networks on ONNX Runtime and LiteRT, one thread, all files of a network interleaved; accuracy on inputs that nobody
calibrated on. Writes docs/results/fast.md, after each network again; rows of other networks are kept in fast.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import networks
import numpy as np
import torch
from layer_times import race
from results import RESULTS, write_page
from torch import nn

from edgeship import api
from edgeship.api import BuildOrder
from edgeship.core.inventory import Inventory
from edgeship.core.model import TensorSpec
from edgeship.program.export import make_program

CALIBRATION, HELD_OUT = 16, 12
# Slower by no more than this than the better of balanced and the peer.
ALLOWED = 1.05

NETWORKS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "EfficientNet-Lite0": ("networks.py:efficientnet_lite0", {"image": (1, 3, 224, 224)}),
    "MobileNetV2": ("networks.py:mobilenet_v2", {"image": (1, 3, 160, 160)}),
    "MobileNetV3": ("networks.py:mobilenet_v3", {"image": (1, 3, 224, 224)}),
    "ResNet": ("networks.py:resnet", {"image": (1, 3, 160, 160)}),
    "DenseNet": ("networks.py:densenet", {"image": (1, 3, 128, 128)}),
    "YOLO": ("networks.py:yolo", {"image": (1, 3, 256, 256)}),
    "U-Net": ("networks.py:unet", {"image": (1, 3, 96, 96)}),
    "ConvNeXt": ("networks.py:convnext", {"image": (1, 3, 128, 128)}),
    "ViT": ("networks.py:vit", {"image": (1, 3, 128, 128)}),
    "TCN": ("networks.py:tcn", {"mel": (1, 40, 100)}),
    "MiniLM": ("models.py:minilm", {"input_ids": (1, 64), "attention_mask": (1, 64)}),
}

Batch = dict[str, np.ndarray]
Run = Callable[[Batch], list[np.ndarray]]


def _data(name: str, shapes: dict[str, tuple[int, ...]], count: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs of a network: images with structure, or tokens."""
    draw = np.random.default_rng(seed)
    if name == "MiniLM":
        ids = draw.integers(1000, 20000, (count, *shapes["input_ids"][1:]))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    ((key, shape),) = shapes.items()
    if name == "EfficientNet-Lite0":
        return {key: _images(count, shape[-1], seed)}
    # Coarse noise made larger, and fine noise on it: neighbours are alike, as in pictures and spectra.
    coarse = torch.from_numpy(draw.standard_normal((count, shape[1], *(size // 8 + 1 for size in shape[2:]))))
    mode = "bilinear" if len(shape) == 4 else "linear"
    smooth = nn.functional.interpolate(coarse, shape[2:], mode=mode).numpy()
    return {key: (smooth + 0.2 * draw.standard_normal((count, *shape[1:]))).astype(np.float32)}


def inventory(name: str) -> Inventory:
    """What a network is made of."""
    source, shapes = NETWORKS[name]
    head, _, function = source.partition(":")
    model = getattr(networks if head == "networks.py" else models, function)()
    given = _data(name, shapes, 1, 0)
    kinds = {"f": "f32", "i": "i64"}
    specs = [TensorSpec(key, kinds[value.dtype.kind], shapes[key]) for key, value in given.items()]  # type: ignore[arg-type]
    return make_program(model, specs, [torch.from_numpy(value) for value in given.values()]).record.inventory


def _images(count: int, size: int, seed: int) -> np.ndarray:
    """CIFAR-10's test images, made larger and normalised."""
    folder = Path(tempfile.mkdtemp())
    evaluation = models.cifar_files(folder, 10, 1000)[1]
    with np.load(evaluation) as held:
        pixels = held["image"][np.random.default_rng(seed).permutation(1000)[:count]]
    shutil.rmtree(folder)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (models.CIFAR_MEAN, models.CIFAR_STD))
    large = nn.functional.interpolate(torch.from_numpy(pixels * std + mean), (size, size), mode="bilinear")
    return ((large.numpy() * 255 - 127) / 128).astype(np.float32)


def _onnx(path: Path, options: dict[str, str] | None = None) -> Run:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    for key, value in (options or {}).items():
        settings.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, batch)


def _litert(path: Path, order: list[str] | None = None) -> Run:
    """Runs a file by its signature; ``order``: the outputs' names where they are ours."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    runner = interpreter.get_signature_runner()
    details, results = runner.get_input_details(), runner.get_output_details()

    def run(batch: Batch) -> list[np.ndarray]:
        # The peer's inputs are called args_0 ..., ours as the model's.
        given = dict(zip(sorted(details), batch.values(), strict=True)) if "args_0" in details else batch
        found = runner(**{name: _in_their_type(value, details[name]) for name, value in given.items()})
        return [_as_float(found[name], results[name]) for name in order or sorted(found)]

    return run


def _in_their_type(value: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    """An input as a file takes it: integers on its grid where its ends are quantized."""
    if value.dtype.kind == "f" and detail["dtype"] == np.int8:
        scale, zero = detail["quantization"]
        return np.clip(np.rint(value / scale) + zero, -128, 127).astype(np.int8)
    return value.astype(detail["dtype"])


def _as_float(value: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    """An output as numbers."""
    scale, zero = detail["quantization"]
    return (value.astype(np.float32) - zero) * scale if value.dtype == np.int8 else value


def _peer_onnx(model: nn.Module, batches: list[Batch], folder: Path) -> dict[str, Run]:
    """Onnxruntime's own tools: static QDQ per channel behind its pre-processing, and dynamic."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> Batch | None:
            return next(self.left, None)

    plain, ready = folder / "plain.onnx", folder / "ready.onnx"
    inputs = tuple(torch.from_numpy(value) for value in batches[0].values())
    torch.onnx.export(
        model, inputs, plain, input_names=list(batches[0]), dynamo=True, verbose=False, external_data=False
    )
    try:
        quant_pre_process(plain, ready)
    except Exception as error:  # its shape inference does not know every graph of torch's exporter
        print(f"the peer's pre-processing failed, it quantizes the file as it is: {type(error).__name__}: {error}")
        ready = plain
    quantize_static(ready, folder / "static.onnx", Reader(), per_channel=True, activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8)  # fmt: skip
    quantize_dynamic(ready, folder / "dynamic.onnx", per_channel=True, weight_type=QuantType.QInt8)
    found = {"peer static": _onnx(folder / "static.onnx")}
    # It writes ConvInteger, which the CPU provider may lack for these types.
    with contextlib.suppress(Exception):
        found["peer dynamic"] = _onnx(folder / "dynamic.onnx")
    return found


def _peer_litert(model: nn.Module, batches: list[Batch], folder: Path) -> dict[str, Run]:
    """ai-edge-quantizer's recipes: static W8A8 and dynamic W8A8."""
    import litert_torch
    from ai_edge_quantizer import quantizer, recipe

    inputs = tuple(torch.from_numpy(value) for value in batches[0].values())
    plain = folder / "plain.tflite"
    litert_torch.convert(model, inputs).export(str(plain))
    found: dict[str, Run] = {}
    for name, chosen in (("static", recipe.static_wi8_ai8()), ("dynamic", recipe.dynamic_wi8_afp32())):
        work = quantizer.Quantizer(str(plain), chosen)
        scales = None
        if work.need_calibration:
            feeds = [{f"args_{i}": value for i, value in enumerate(batch.values())} for batch in batches]
            scales = work.calibrate({"serving_default": feeds})
        path = folder / f"{name}.tflite"
        work.quantize(scales).export_model(str(path), overwrite=True)
        found[f"peer {name}"] = _litert(path)
    return found


def _snr(wanted: list[list[np.ndarray]], found: list[list[np.ndarray]]) -> float:
    """The worst output's ratio in dB over all samples."""
    ratios = []
    for number in range(len(wanted[0])):
        signal = sum(float((item[number].astype(np.float64) ** 2).sum()) for item in wanted)
        noise = sum(
            float(((a[number].astype(np.float64) - b[number].reshape(a[number].shape)) ** 2).sum())
            for a, b in zip(wanted, found, strict=True)
        )
        ratios.append(10 * np.log10(signal / max(noise, 1e-30)))
    return min(ratios)


def _row(name: str, runtime: str, folder: Path) -> dict[str, Any]:
    """Build, quantize with the peer, time and compare one network on one runtime."""
    source, shapes = NETWORKS[name]
    held_data = _data(name, shapes, HELD_OUT, 1)
    given = _data(name, shapes, CALIBRATION, 0)
    np.savez(folder / "calibration.npz", **given)
    head, _, function = source.partition(":")
    model: nn.Module = getattr(networks if head == "networks.py" else models, function)()
    held = [{key: value[i : i + 1] for key, value in held_data.items()} for i in range(HELD_OUT)]
    batches = [{key: value[i : i + 1] for key, value in given.items()} for i in range(CALIBRATION)]
    with torch.no_grad():
        answers = [model(*(torch.from_numpy(value) for value in batch.values())) for batch in held]
    wanted = [[part.numpy() for part in (answer if isinstance(answer, tuple) else (answer,))] for answer in answers]
    kinds = {"f": "f32", "i": "i64"}
    specs = tuple(f"{key}:{kinds[value.dtype.kind]}[{','.join(map(str, shapes[key]))}]" for key, value in given.items())
    runs: dict[str, Run] = {}
    row: dict[str, Any] = {"network": name, "runtime": runtime}
    for profile in ("balanced", "fast"):
        order = BuildOrder(
            str(Path(__file__).parent / source), ("linux-x86",), (runtime,), profile, folder / profile, specs,
            calibration=str(folder / "calibration.npz"),
            # What is lost against the original is a column here, not a gate.
            options={"check/verify": {"min_total_db": -200}},
        )  # fmt: skip
        report = api.run(order)
        made = report.rows[0]
        row[f"{profile} activations"] = made.activations
        if not report.passed:
            short = "; ".join(verdict.summary for verdict in made.verdicts if not verdict.passed)
            row["problem"] = f"{profile} fell short: {short}"
            continue
        path = next((folder / profile).rglob("model.onnx" if runtime == "onnx" else "model.tflite"))
        names = json.loads((folder / profile / "manifest.json").read_text())["artifacts"][0]["signature"]["outputs"]
        runs[profile] = _onnx(path) if runtime == "onnx" else _litert(path, [entry["name"] for entry in names])
    runs |= (_peer_onnx if runtime == "onnx" else _peer_litert)(model, batches, folder)
    times = race({key: _once(run, held[0]) for key, run in runs.items()})
    for key, run in runs.items():
        found = [[np.asarray(part) for part in run(batch)] for batch in held]
        row[key] = {"ms": times[key], "db": _snr(wanted, found)}
    return row


def _once(run: Run, batch: Batch) -> Callable[[], object]:
    return lambda: run(batch)


def _write(rows: list[dict[str, Any]], load: float) -> None:
    """The page of all rows there are."""
    there = {(row["runtime"], row["network"]) for row in rows}
    missing = {runtime: [name for name in NETWORKS if (runtime, name) not in there] for runtime in ("onnx", "tflite")}
    shown = []
    for row in rows:
        kinds = ("balanced", "fast", "peer static", "peer dynamic")
        cells = [f"{row[kind]['ms']:.2f} ({row[kind]['db']:.0f})" if kind in row else "-" for kind in kinds]
        others = [row[kind] for kind in kinds if kind != "fast" and kind in row]
        if "fast" not in row or not others:
            shown.append(
                (row["runtime"], row["network"], row.get("fast activations", "-"), *cells, "-", row["problem"])
            )
            continue
        best = min(item["ms"] for item in others)
        ratio = row["fast"]["ms"] / best
        # Quicker at a coarser arithmetic is no better.
        fair = [item["ms"] for item in others if item["db"] >= row["fast"]["db"] - 1]
        held = (
            "yes"
            if ratio <= ALLOWED
            else "yes, at its accuracy"
            if row["fast"]["ms"] <= ALLOWED * min(fair, default=np.inf)
            else "no"
        )
        shown.append((row["runtime"], row["network"], row["fast activations"], *cells, f"{ratio:.2f}", held))
    write_page(
        "fast",
        "Profile fast beside balanced and the runtimes' own quantizers",
        "python benchmarks/fast.py",
        ("onnxruntime", "ai-edge-litert", "ai-edge-quantizer", "litert-torch", "torch"),
        ("runtime", "network", "fast has activations", "balanced", "fast", "peer static", "peer dynamic",
         "fast / best other", "held"),
        shown,
        before="Milliseconds of a run on one thread, and in brackets the worst output's ratio to the float original in "
        "dB on inputs that were not calibrated on. The files of a row are interleaved in one process: the median over 25 "
        f"rounds of the least time in a round; {load:.1f} processes wanted the two cores meanwhile. Peers: onnxruntime's "
        "quantize_static (behind its pre-processing where that takes the file, per channel) and quantize_dynamic; ai-edge-quantizer's static_wi8_ai8 "
        "and dynamic_wi8_afp32. Random weights but for EfficientNet-Lite0 and MiniLM. Held: at most 1.05 of the better "
        "of balanced and the peer; \"at its accuracy\": of those that lose no more.",
        after="".join(f"Not measured yet: {runtime}: {', '.join(names)}.\n" for runtime, names in missing.items() if names),
    )  # fmt: skip


def main() -> None:
    """Measure the networks that are named, all by default, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NETWORKS, []])
    parser.add_argument("--runtime", action="append", choices=["onnx", "tflite"])
    given = parser.parse_args()
    kept = RESULTS / "fast.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.is_file() else []
    for name in given.names or NETWORKS:
        for runtime in given.runtime or ("onnx", "tflite"):
            folder = Path(tempfile.mkdtemp())
            try:
                row = _row(name, runtime, folder)
            finally:
                shutil.rmtree(folder)
            rows = [item for item in rows if (item["network"], item["runtime"]) != (name, runtime)]
            rows.append(row)
            rows.sort(key=lambda item: (item["runtime"], list(NETWORKS).index(item["network"])))
            kept.write_text(json.dumps(rows, indent=1) + "\n")
            _write(rows, os.getloadavg()[0])


if __name__ == "__main__":
    main()
