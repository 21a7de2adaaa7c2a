"""How long a layer takes in each arithmetic on this machine: ``python benchmarks/layer_times.py [--only KIND]``.

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
from collections.abc import Callable, Sequence
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

KEPT = Path(__file__).resolve().parents[1] / "docs" / "results" / "layer-times.json"
REPEATED = 4
ROUNDS = 25


class _Attention(nn.Module):
    """Softmax attention of six heads over what it is given as query, key and value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(1, T, 384)`` to the same."""
        split = x.reshape(1, -1, 6, 64).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(split, split, split).transpose(1, 2).reshape(x.shape)


class _Sum(nn.Module):
    """What it is given and a tensor of the same shape, added.

    Args:
        shape: of both.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.randn(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``shape`` to the same."""
        return x + self.other


# kind of layer in the table of times, as `edgeship.core.speed` has it: (what is shown, the layer, its input's shape).
# Of each kind a small layer beside usual ones: what the small one takes is mostly what any layer takes.
LAYERS: list[tuple[str, str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("conv", "1x1, 16 channels, 8 px", lambda: nn.Conv2d(16, 16, 1), (1, 16, 8, 8)),
    ("conv", "3x3, 8 channels, 8 px", lambda: nn.Conv2d(8, 8, 3, 1, 1), (1, 8, 8, 8)),
    ("conv", "1x1, 64 channels, 56 px", lambda: nn.Conv2d(64, 64, 1), (1, 64, 56, 56)),
    ("conv", "1x1, 256 channels, 14 px", lambda: nn.Conv2d(256, 256, 1), (1, 256, 14, 14)),
    ("conv", "3x3, 64 channels, 28 px", lambda: nn.Conv2d(64, 64, 3, 1, 1), (1, 64, 28, 28)),
    ("grouped_conv", "3x3, 16 channels, 4 groups, 8 px", lambda: nn.Conv2d(16, 16, 3, 1, 1, groups=4), (1, 16, 8, 8)),
    ("grouped_conv", "3x3, 64 channels, 4 groups", lambda: nn.Conv2d(64, 64, 3, 1, 1, groups=4), (1, 64, 28, 28)),
    ("depthwise_conv", "3x3, 16 channels, 8 px", lambda: nn.Conv2d(16, 16, 3, 1, 1, groups=16), (1, 16, 8, 8)),
    ("depthwise_conv", "3x3, 96 channels, 28 px", lambda: nn.Conv2d(96, 96, 3, 1, 1, groups=96), (1, 96, 28, 28)),
    ("depthwise_conv", "5x5, 240 channels, 14 px", lambda: nn.Conv2d(240, 240, 5, 1, 2, groups=240), (1, 240, 14, 14)),
    ("linear_row", "32, 1 row", lambda: nn.Linear(32, 32), (1, 32)),
    ("linear_row", "512, 1 row", lambda: nn.Linear(512, 512), (1, 512)),
    ("linear", "32, 8 rows", lambda: nn.Linear(32, 32), (1, 8, 32)),
    ("linear", "384, 128 rows", lambda: nn.Linear(384, 384), (1, 128, 384)),
    ("linear", "1024, 64 rows", lambda: nn.Linear(1024, 1024), (1, 64, 1024)),
    ("norm", "32, 8 rows", lambda: nn.LayerNorm(32), (1, 8, 32)),
    ("norm", "384, 128 rows", lambda: nn.LayerNorm(384), (1, 128, 384)),
    ("silu", "SiLU, 32, 8 rows", nn.SiLU, (1, 8, 32)),
    ("silu", "SiLU, 384, 128 rows", nn.SiLU, (1, 128, 384)),
    ("hardswish", "Hardswish, 8 channels, 8 px", nn.Hardswish, (1, 8, 8, 8)),
    ("hardswish", "Hardswish, 64 channels, 28 px", nn.Hardswish, (1, 64, 28, 28)),
    ("gelu", "GELU, 32, 8 rows", nn.GELU, (1, 8, 32)),
    ("gelu", "GELU, 384, 128 rows", nn.GELU, (1, 128, 384)),
    ("elementwise", "a sum, 32, 8 rows", lambda: _Sum(1, 8, 32), (1, 8, 32)),
    ("elementwise", "a sum, 384, 128 rows", lambda: _Sum(1, 128, 384), (1, 128, 384)),
    ("attention", "6 heads of 64, 8 rows", _Attention, (1, 8, 384)),
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


def fit(units: Sequence[int], times: Sequence[float]) -> tuple[float, float]:
    """What a layer takes whatever its size, and what a unit of it takes, in the unit of ``times``.

    Neither is below 0; relative errors count, so that small layers say as much as large ones.

    Args:
        units, times: of layers of one kind, in one arithmetic.
    """
    # [layers, 2]: each row divided by its time, so that 1 is wanted everywhere.
    rows = np.array([[1 / time, unit / time] for unit, time in zip(units, times, strict=True)])
    wanted = np.ones(len(rows))
    both = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    if min(both) >= 0:
        return float(both[0]), float(both[1])
    alone = [float(column @ wanted / (column @ column)) for column in rows.T]
    left = [float(np.square(column * value - 1).sum()) for column, value in zip(rows.T, alone, strict=True)]
    return (alone[0], 0.0) if left[0] < left[1] else (0.0, alone[1])


def main() -> None:
    """Time every kind of layer; write the table for people and the one that builds read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="Time these kinds; the others keep what was measured before.")
    only = parser.parse_args().only or sorted({kind for kind, *_ in LAYERS})
    kept = [] if set(only) >= {kind for kind, *_ in LAYERS} else json.loads(KEPT.read_text(encoding="utf-8"))
    rows = [tuple(row) for row in kept if row[1] not in only]
    before = json.loads(speed.TIMES.read_text(encoding="utf-8")) if kept else {}
    rates: dict[str, dict[str, dict[str, float]]] = before.get("nanoseconds_of_1000_units", {})
    fixed: dict[str, dict[str, dict[str, float]]] = before.get("nanoseconds_of_a_layer", {})
    for runtime in ("onnx", "tflite"):
        seen: dict[str, list[tuple[int, dict[str, float]]]] = {}
        for kind, name, make, shape in LAYERS:
            if kind not in only:
                continue
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
            shown = [f"{found[mode] / REPEATED:.4f}" for mode in speed.MODES]
            rows.append((runtime, kind, name, *shown, min(found, key=found.__getitem__)))
            print(*rows[-1], flush=True)
            # Nanoseconds of one layer.
            seen.setdefault(kind, []).append(
                (units // REPEATED, {mode: 1e6 * found[mode] / REPEATED for mode in speed.MODES})
            )
        rates.setdefault(runtime, {})
        fixed.setdefault(runtime, {})
        for kind, layers in seen.items():
            both = {mode: fit([size for size, _ in layers], [time[mode] for _, time in layers]) for mode in speed.MODES}
            fixed[runtime][kind] = {mode: round(values[0], 1) for mode, values in both.items()}
            rates[runtime][kind] = {mode: round(1000 * values[1], 4) for mode, values in both.items()}
    order = {kind: place for place, (kind, *_) in enumerate(LAYERS)}
    rows.sort(key=lambda row: (row[0], order[row[1]]))
    KEPT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    about = machine()
    packages = ("onnxruntime", "ai-edge-litert")
    origin = {
        "made_by": "python benchmarks/layer_times.py",
        "date": str(datetime.date.today()),
        "processor": about["processor"],
        "threads": 1,
        "versions": {package: metadata.version(package) for package in packages},
    }
    table = {"origin": origin, "nanoseconds_of_a_layer": fixed, "nanoseconds_of_1000_units": rates}
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
        "to 8 bits while running, where our lowering uses such a kernel; static: on grids from calibration. Of each kind "
        "builds read two figures: what a layer takes whatever its size, and what a unit of it takes.",
    )


if __name__ == "__main__":
    main()
