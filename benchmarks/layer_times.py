"""How long a layer takes in each arithmetic on this machine: ``python benchmarks/layer_times.py``.

Writes docs/results/layer-times.md, and edgeship/core/layer_times.json, by which profile `fast` chooses between float,
dynamic and static activations.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from results import write_page
from torch import nn

from edgeship.compression.affine import quantize_nearest
from edgeship.compression.calibrate import decide_activations
from edgeship.core import speed
from edgeship.core.model import Artifact, TensorSpec, TorchModel
from edgeship.core.passes import Context
from edgeship.core.weights import Affine
from edgeship.engine.gathering import machine
from edgeship.passes.lower.torch_to_onnx import TorchToOnnx
from edgeship.passes.lower.torch_to_tflite import TorchToTFLite
from edgeship.program.export import make_program
from edgeship.program.program import TorchProgram
from edgeship.program.rewrites import for_static_activations

REPEATED = 4
ROUNDS = 25


class _Attention(nn.Module):
    """Softmax attention of six heads over what it is given as query, key and value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(1, T, 384)`` to the same."""
        split = x.reshape(1, -1, 6, 64).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(split, split, split).transpose(1, 2).reshape(x.shape)


# kind of layer in the table of times, as `edgeship.core.speed` has it: (what is shown, the layer, its input's shape)
LAYERS: list[tuple[str, str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("conv", "1x1, 64 channels, 56 px", lambda: nn.Conv2d(64, 64, 1), (1, 64, 56, 56)),
    ("conv", "1x1, 256 channels, 14 px", lambda: nn.Conv2d(256, 256, 1), (1, 256, 14, 14)),
    ("conv", "3x3, 64 channels, 28 px", lambda: nn.Conv2d(64, 64, 3, 1, 1), (1, 64, 28, 28)),
    ("grouped_conv", "3x3, 64 channels, 4 groups", lambda: nn.Conv2d(64, 64, 3, 1, 1, groups=4), (1, 64, 28, 28)),
    ("depthwise_conv", "3x3, 96 channels, 28 px", lambda: nn.Conv2d(96, 96, 3, 1, 1, groups=96), (1, 96, 28, 28)),
    ("depthwise_conv", "5x5, 240 channels, 14 px", lambda: nn.Conv2d(240, 240, 5, 1, 2, groups=240), (1, 240, 14, 14)),
    ("linear_row", "512, 1 row", lambda: nn.Linear(512, 512), (1, 512)),
    ("linear", "384, 128 rows", lambda: nn.Linear(384, 384), (1, 128, 384)),
    ("norm", "384, 128 rows", lambda: nn.LayerNorm(384), (1, 128, 384)),
    ("activation", "GELU, 384, 128 rows", nn.GELU, (1, 128, 384)),
    ("attention", "6 heads of 64, 128 rows", _Attention, (1, 128, 384)),
]


def _program(make: Callable[[], nn.Module], shape: tuple[int, ...], activations: str) -> TorchProgram:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(REPEATED) for layer in (make(), nn.ReLU6()))).eval()
    program = make_program(model, [TensorSpec("x", "f32", shape)], [torch.randn(shape)])
    if activations == "int8":
        program = for_static_activations(program, 8)
    encoded = {
        use.name: quantize_nearest(program.weight(use.name), Affine(8), axis=use.channel_axis)
        for use in program.record.inventory.weights
        if use.op != "other"
    }
    record = dataclasses.replace(program.record, encodings={name: item.encoding for name, item in encoded.items()})
    program = dataclasses.replace(program, encoded=encoded, record=record)
    if activations != "int8":
        return program
    draw = np.random.default_rng(0)
    batches = [{"x": draw.standard_normal(shape).astype(np.float32)} for _ in range(4)]
    grids = decide_activations(program, batches, bits=8)
    return dataclasses.replace(program, record=dataclasses.replace(program.record, activations=grids))


def _lowered(program: TorchProgram, runtime: str, activations: str, folder: Path) -> Artifact:
    program.save(folder / "program")
    (folder / "out").mkdir()
    step = (TorchToOnnx if runtime == "onnx" else TorchToTFLite)(activations)  # type: ignore[arg-type]
    return step.run(TorchModel(folder / "program", program.signature), Context(folder / "out"))


def once(artifact: Artifact) -> Callable[[], object]:
    """One run of an artifact on one thread."""
    draw = np.random.default_rng(0)
    feeds = {
        spec.name: draw.standard_normal(spec.shape).astype(np.float32)
        if spec.dtype == "f32"
        else np.ones(spec.shape, spec.numpy_dtype)
        for spec in artifact.signature.inputs
    }
    if artifact.runtime == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, feeds)
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(artifact.path), num_threads=1)
    interpreter.allocate_tensors()
    runner = interpreter.get_signature_runner()
    for name, detail in runner.get_input_details().items():
        interpreter.set_tensor(detail["index"], feeds[name])
    return interpreter.invoke


def race(runs: dict[str, Callable[[], object]], rounds: int = ROUNDS, seconds: float = 0.03) -> dict[str, float]:
    """Milliseconds of each, interleaved: the median over rounds of the least time within a round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):
            run()
    for _ in range(rounds):
        for name, run in runs.items():
            least, end = float("inf"), time.perf_counter() + seconds
            while time.perf_counter() < end or least == float("inf"):
                start = time.perf_counter()
                run()
                least = min(least, time.perf_counter() - start)
            times[name].append(1000 * least)
    return {name: statistics.median(values) for name, values in times.items()}


def _units(kind: str, program: TorchProgram) -> int:
    """What the times of a kind of layer are divided by."""
    uses = {use.name: use for use in program.record.inventory.weights}
    costs = [cost for cost in program.record.inventory.ops if speed.kind_of(cost, uses) == kind]
    return sum(cost.elements_out if kind in speed.BY_ELEMENTS else cost.macs for cost in costs)


def main() -> None:
    """Time every kind of layer; write the table for people and the one that builds read."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows, rates = [], {}
    for runtime in ("onnx", "tflite"):
        seen: dict[str, list[dict[str, float]]] = {}
        for kind, name, make, shape in LAYERS:
            with tempfile.TemporaryDirectory() as folder:
                runs, units = {}, 0
                for mode in speed.MODES:
                    place = Path(folder) / mode
                    place.mkdir()
                    program = _program(make, shape, mode)
                    runs[mode] = once(_lowered(program, runtime, mode, place))
                    # The spelled-out form of static programs has more and smaller operators.
                    units = units if mode == "int8" else _units(kind, program)
                found = race(runs)
            shown = [f"{found[mode] / REPEATED:.3f}" for mode in speed.MODES]
            rows.append((runtime, kind, name, *shown, min(found, key=found.__getitem__)))
            print(*rows[-1], flush=True)
            seen.setdefault(kind, []).append({mode: 1e9 * found[mode] / units for mode in speed.MODES})
        rates[runtime] = {
            kind: {mode: round(statistics.geometric_mean(item[mode] for item in items), 4) for mode in speed.MODES}
            for kind, items in seen.items()
        }
    about = machine()
    packages = ("onnxruntime", "ai-edge-litert")
    origin = {
        "made_by": "python benchmarks/layer_times.py",
        "date": str(datetime.date.today()),
        "processor": about["processor"],
        "threads": 1,
        "versions": {package: metadata.version(package) for package in packages},
    }
    table = {"origin": origin, "nanoseconds_of_1000_units": rates}
    speed.TIMES.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    write_page(
        "layer-times",
        "Milliseconds of a layer by arithmetic",
        "python benchmarks/layer_times.py",
        packages,
        ("runtime", "kind", "layer", "float", "dynamic", "static", "quickest"),
        rows,
        before="One thread, weights in 8 bits per channel, four layers in a row with a ReLU6 behind each; the median "
        "over 25 interleaved rounds of the least time in a round. Float: weights widened; dynamic: activations rounded "
        "to 8 bits while running, where our lowering uses such a kernel; static: on grids from calibration.",
    )


if __name__ == "__main__":
    main()
