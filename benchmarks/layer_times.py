"""How long a layer takes in each arithmetic on this machine: ``python benchmarks/layer_times.py [--only KIND]``.

Writes docs/results/layer-times.md, and edgeship/core/layer_times.json, by which profile `fast` chooses between float,
dynamic and static activations. Rows of other kinds are kept in layer-times.json; ``--fit`` times nothing and reckons the
table of builds from what is kept; ``--networks`` takes over the whole networks of docs/results/fast.md first.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

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
# The kind of a whole network, as profiles `balanced` and `fast` had it, and what it weighs beside a layer alone.
NETWORK, WEIGHT = "network", 4.0
# Networks of which `fast` had half in float, or a table that was widened at every run: they say nothing of integers.
MIXED = ("YOLO", "MiniLM")


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


class _Gate(nn.Module):
    """Squeeze and excitation: channels weighed by what their means say.

    Args:
        channels: of the input. middle: between the two products.
    """

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, middle, 1), nn.Conv2d(middle, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(1, C, H, W)`` to the same."""
        means = nn.functional.adaptive_avg_pool2d(x, 1)
        return x * nn.functional.hardsigmoid(self.up(torch.relu(self.down(means))))


class _Centred(nn.Module):
    """An image without its channels' means."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(1, C, H, W)`` to the same."""
        return x - x.mean((2, 3), keepdim=True)


class _Joined(nn.Module):
    """A convolution of what it is given beside another convolution of it.

    Args:
        channels: of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.beside, self.both = nn.Conv2d(channels, channels, 1), nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(1, C, H, W)`` to the same."""
        return self.both(torch.cat([x, self.beside(x)], 1))


def _conv(inner: int, outer: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups)


def _there_and_back(channels: int, middle: int) -> nn.Module:
    return nn.Sequential(_conv(channels, middle), nn.ReLU6(), _conv(middle, channels))


# Kinds with multiply-accumulates whose rows can tell what these take from what the numbers take that are read and written.
TOLD_APART = ("conv", "pointwise_conv")
# (kind of layer, what is shown, the layer, its input's shape). Of each kind a small layer beside usual ones: what the small
# one takes is mostly what any layer takes. Other kinds may be part of it: all rows are reckoned together.
LAYERS: list[tuple[str, str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("conv", "3x3, 8 channels, 8 px", lambda: _conv(8, 8, 3), (1, 8, 8, 8)),
    ("conv", "3x3, 16 channels, 56 px", lambda: _conv(16, 16, 3), (1, 16, 56, 56)),
    ("conv", "3x3, 64 channels, 28 px", lambda: _conv(64, 64, 3), (1, 64, 28, 28)),
    ("conv", "3x3, 128 channels, 8 px", lambda: _conv(128, 128, 3), (1, 128, 8, 8)),
    ("pointwise_conv", "1x1, 16 channels, 8 px", lambda: _conv(16, 16), (1, 16, 8, 8)),
    ("pointwise_conv", "1x1, 64 channels, 56 px", lambda: _conv(64, 64), (1, 64, 56, 56)),
    ("pointwise_conv", "1x1, 256 channels, 14 px", lambda: _conv(256, 256), (1, 256, 14, 14)),
    ("pointwise_conv", "1x1, 16 to 72 and back, 56 px", lambda: _there_and_back(16, 72), (1, 16, 56, 56)),
    ("pointwise_conv", "1x1, 96 to 576 and back, 7 px", lambda: _there_and_back(96, 576), (1, 96, 7, 7)),
    ("pixel_conv", "1x1, 64 to 16 and back, 1 px", lambda: _there_and_back(64, 16), (1, 64, 1, 1)),
    ("pixel_conv", "1x1, 576 to 144 and back, 1 px", lambda: _there_and_back(576, 144), (1, 576, 1, 1)),
    ("grouped_conv", "3x3, 16 channels, 4 groups, 8 px", lambda: _conv(16, 16, 3, 1, 4), (1, 16, 8, 8)),
    ("grouped_conv", "3x3, 64 channels, 4 groups", lambda: _conv(64, 64, 3, 1, 4), (1, 64, 28, 28)),
    ("depthwise_conv", "3x3, 16 channels, 8 px", lambda: _conv(16, 16, 3, 1, 16), (1, 16, 8, 8)),
    ("depthwise_conv", "3x3, 96 channels, 28 px", lambda: _conv(96, 96, 3, 1, 96), (1, 96, 28, 28)),
    ("depthwise_conv", "5x5, 240 channels, 14 px", lambda: _conv(240, 240, 5, 1, 240), (1, 240, 14, 14)),
    ("linear_row", "32, 1 row", lambda: nn.Linear(32, 32), (1, 32)),
    ("linear_row", "512, 1 row", lambda: nn.Linear(512, 512), (1, 512)),
    ("linear", "32, 8 rows", lambda: nn.Linear(32, 32), (1, 8, 32)),
    ("linear", "384, 128 rows", lambda: nn.Linear(384, 384), (1, 128, 384)),
    ("linear", "1024, 64 rows", lambda: nn.Linear(1024, 1024), (1, 64, 1024)),
    ("norm", "32, 8 rows", lambda: nn.LayerNorm(32), (1, 8, 32)),
    ("norm", "384, 128 rows", lambda: nn.LayerNorm(384), (1, 128, 384)),
    ("silu", "SiLU, 32, 8 rows", nn.SiLU, (1, 8, 32)),
    ("silu", "SiLU, 384, 128 rows", nn.SiLU, (1, 128, 384)),
    ("silu", "SiLU of 3x3, 32 channels, 40 px", lambda: nn.Sequential(_conv(32, 32, 3), nn.SiLU()), (1, 32, 40, 40)),
    ("hardswish", "Hardswish, 8 channels, 8 px", nn.Hardswish, (1, 8, 8, 8)),
    ("hardswish", "Hardswish, 64 channels, 28 px", nn.Hardswish, (1, 64, 28, 28)),
    ("hardswish", "Hardswish of 1x1, 16 channels, 8 px", lambda: nn.Sequential(_conv(16, 16), nn.Hardswish()),
     (1, 16, 8, 8)),
    ("hardswish", "Hardswish of 1x1, 64 channels, 28 px", lambda: nn.Sequential(_conv(64, 64), nn.Hardswish()),
     (1, 64, 28, 28)),
    ("hardsigmoid", "Hardsigmoid, 8 channels, 8 px", nn.Hardsigmoid, (1, 8, 8, 8)),
    ("hardsigmoid", "Hardsigmoid, 64 channels, 28 px", nn.Hardsigmoid, (1, 64, 28, 28)),
    ("sigmoid", "Sigmoid, 8 channels, 8 px", nn.Sigmoid, (1, 8, 8, 8)),
    ("sigmoid", "Sigmoid, 64 channels, 28 px", nn.Sigmoid, (1, 64, 28, 28)),
    ("gelu", "GELU, 32, 8 rows", nn.GELU, (1, 8, 32)),
    ("gelu", "GELU, 384, 128 rows", nn.GELU, (1, 128, 384)),
    ("mean", "means taken off, 8 channels, 8 px", _Centred, (1, 8, 8, 8)),
    ("mean", "means taken off, 64 channels, 28 px", _Centred, (1, 64, 28, 28)),
    ("mean", "a gate of 96 channels, 14 px", lambda: _Gate(96, 24), (1, 96, 14, 14)),
    ("mean", "a gate of 32 channels, 28 px", lambda: _Gate(32, 8), (1, 32, 28, 28)),
    ("join", "beside its 1x1, 8 channels, 8 px", lambda: _Joined(8), (1, 8, 8, 8)),
    ("join", "beside its 1x1, 64 channels, 28 px", lambda: _Joined(64), (1, 64, 28, 28)),
    ("elementwise", "a sum, 32, 8 rows", lambda: _Sum(1, 8, 32), (1, 8, 32)),
    ("elementwise", "a sum, 384, 128 rows", lambda: _Sum(1, 128, 384), (1, 128, 384)),
    ("attention", "6 heads of 64, 8 rows", _Attention, (1, 8, 384)),
    ("attention", "6 heads of 64, 128 rows", _Attention, (1, 128, 384)),
]  # fmt: skip


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


def race(
    runs: dict[str, Callable[[], object]],
    rounds: int = ROUNDS,
    seconds: float = 0.03,
    take: Callable[[Sequence[float]], float] = statistics.median,
) -> dict[str, float]:
    """Milliseconds of each, interleaved: of the least time within each round the median, or what ``take`` takes."""
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
    return {name: take(values) for name, values in times.items()}


def fit(
    amounts: Sequence[Mapping[str, speed.Times]], times: Sequence[float], weights: Sequence[float] | None = None
) -> dict[str, list[float]]:
    """For each kind of layer what a layer, a thousand of its multiply-accumulates and a thousand of its numbers take.

    None is below 0; relative errors count, so that small layers say as much as large ones. Where the rows cannot tell
    them apart, multiply-accumulates stand for the numbers too.

    Args:
        amounts: of each program. times: of each program, in one arithmetic; the result is in their unit.
        weights: what the relative error of each counts; 1 where nobody says.
    """
    from scipy.optimize import nnls

    kinds = sorted({kind for row in amounts for kind in row})
    # [programs, 3 * kinds]: each row divided by its time, so that 1 is wanted everywhere.
    rows = np.zeros((len(amounts), 3 * len(kinds)))
    for place, kind in enumerate(kinds):
        columns = slice(3 * place, 3 * place + 3)
        rows[:, columns] = [row.get(kind, (0.0, 0.0, 0.0)) for row in amounts]
        if kind not in TOLD_APART and rows[:, 3 * place + 1].any():
            rows[:, 3 * place + 2] = 0
    heavy = np.ones(len(rows)) if weights is None else np.array(weights)
    rows *= (heavy / np.array(times))[:, None]
    # Columns of like length, for the solver's own tolerances.
    lengths = np.maximum(np.linalg.norm(rows, axis=0), 1e-30)
    found = nnls(rows / lengths, heavy)[0] / lengths
    return {kind: [float(value) for value in found[3 * place : 3 * place + 3]] for place, kind in enumerate(kinds)}


@dataclasses.dataclass(frozen=True)
class Row:
    """One timed program.

    Args:
        amounts: of the layers in it, by kind. milliseconds: of the whole program, by arithmetic.
    """

    runtime: str
    kind: str
    layer: str
    amounts: dict[str, list[float]]
    milliseconds: dict[str, float]

    def cells(self) -> list[str]:
        """The row as text."""
        each = 1 if self.kind == NETWORK else REPEATED
        found = {mode: self.milliseconds[mode] / each for mode in speed.MODES if mode in self.milliseconds}
        shown = [f"{found[mode]:.4f}" if mode in found else "" for mode in speed.MODES]
        return [self.runtime, self.kind, self.layer, *shown, min(found, key=found.__getitem__)]


def measured(runtime: str, kind: str, layer: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Row:
    """Lower and time one layer in every arithmetic."""
    runs, amounts = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for mode in speed.MODES:
            place = Path(folder) / mode
            place.mkdir()
            program = _program(make, shape, mode)
            runs[mode] = once(_lowered(program, runtime, mode, place))
            if mode == "float":
                # The spelled-out form of static programs has more and smaller operators.
                amounts = speed.amounts_of(program.record.inventory)
        # The least of all: other work on the machine makes times longer, and none shorter.
        found = race(runs, take=min)
    return Row(runtime, kind, layer, {name: list(values) for name, values in amounts.items()}, found)


def networks(before: Mapping[tuple[str, str, str], Row]) -> list[Row]:
    """The networks of docs/results/fast.md, each in the arithmetics that it was timed in there, or ``before``."""
    import fast

    found: dict[tuple[str, str], Row] = {}
    for item in json.loads((KEPT.parent / "fast.json").read_text(encoding="utf-8")):
        name, runtime = item["network"], item["runtime"]
        times = {
            item[f"{profile} activations"]: item[profile]["ms"] for profile in ("balanced", "fast") if profile in item
        }
        if name not in MIXED and set(times) <= set(speed.MODES):
            known = before.get((runtime, NETWORK, name))
            found[runtime, name] = Row(runtime, NETWORK, name, {}, {**(known.milliseconds if known else {}), **times})
    amounts = {name: speed.amounts_of(fast.inventory(name)) for name in dict.fromkeys(name for _, name in found)}
    return [
        dataclasses.replace(row, amounts={kind: list(values) for kind, values in amounts[name].items()})
        for (_, name), row in found.items()
    ]


def table_of(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Runtime -> kind -> arithmetic -> nanoseconds, as builds read them."""
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    for runtime in sorted({row.runtime for row in rows}):
        some = [row for row in rows if row.runtime == runtime]
        alone = {mode: _fitted([row for row in some if row.kind != NETWORK], mode) for mode in speed.MODES}
        for mode in speed.MODES:
            filled = some
            if not any(row.kind == NETWORK and mode in row.milliseconds for row in some):
                filled = [_filled(row, mode, alone) for row in some]
            for kind, values in _fitted([row for row in filled if mode in row.milliseconds], mode).items():
                table.setdefault(runtime, {}).setdefault(kind, {})[mode] = [round(value, 4) for value in values]
    return table


def _fitted(rows: Sequence[Row], mode: str) -> dict[str, list[float]]:
    amounts = [{kind: (values[0], values[1], values[2]) for kind, values in row.amounts.items()} for row in rows]
    # Milliseconds to nanoseconds.
    times = [1e6 * row.milliseconds[mode] for row in rows]
    return fit(amounts, times, [WEIGHT if row.kind == NETWORK else 1.0 for row in rows])


def _filled(row: Row, mode: str, alone: Mapping[str, Mapping[str, Sequence[float]]]) -> Row:
    """A network in an arithmetic that no network was timed in: float's time, by what its layers alone say of both."""
    totals = {
        name: sum(
            time * amount
            for kind, amounts in row.amounts.items()
            for time, amount in zip(alone[name].get(kind, (0.0, 0.0, 0.0)), amounts, strict=True)
        )
        for name in (mode, "float")
    }
    guessed = row.milliseconds["float"] * totals[mode] / totals["float"]
    return dataclasses.replace(row, milliseconds={mode: guessed, **row.milliseconds})


def main() -> None:
    """Time every kind of layer; write the table for people and the one that builds read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="Time these kinds; the others keep what was measured before.")
    parser.add_argument("--missing", action="store_true", help="Time the layers that have no row yet.")
    parser.add_argument("--fit", action="store_true", help="Time nothing.")
    parser.add_argument("--networks", action="store_true", help="Take over the networks of fast.json.")
    given = parser.parse_args()
    kept: list[dict[str, Any]] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else []
    known = {(kind, layer) for kind, layer, *_ in LAYERS}
    there = [Row(**item) for item in kept]
    rows = {
        (row.runtime, row.kind, row.layer): row
        for row in there
        if row.kind == NETWORK or (row.kind, row.layer) in known
    }
    if given.networks:
        rows |= {(row.runtime, row.kind, row.layer): row for row in networks(rows)}
    for runtime in ("onnx", "tflite"):
        for kind, layer, make, shape in LAYERS:
            wanted = not given.fit and (given.only is None or kind in given.only)
            key = (runtime, kind, layer)
            if wanted and not (given.missing and key in rows):
                rows[key] = measured(runtime, kind, layer, make, shape)
                print(*rows[key].cells(), flush=True)
                write(list(rows.values()))
    write(list(rows.values()))


def write(rows: list[Row]) -> None:
    """What is kept, the table of builds, and the page."""
    order = {(kind, layer): place for place, (kind, layer, *_) in enumerate(LAYERS)}
    rows.sort(key=lambda row: (row.runtime, order.get((row.kind, row.layer), len(order)), row.layer))
    KEPT.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    about = machine()
    packages = ("onnxruntime", "ai-edge-litert")
    origin = {
        "made_by": "python benchmarks/layer_times.py",
        "date": str(datetime.date.today()),
        "processor": about["processor"],
        "threads": 1,
        "versions": {package: metadata.version(package) for package in packages},
    }
    table = {"origin": origin, "nanoseconds": table_of(rows)}
    speed.TIMES.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    write_page(
        "layer-times",
        "Milliseconds of a layer by arithmetic",
        "python benchmarks/layer_times.py",
        packages,
        ("runtime", "kind", "layer", "float", "dynamic", "static", "quickest"),
        [row.cells() for row in rows],
        before="One thread, weights in 8 bits per channel, four layers in a row with a ReLU6 behind each; the least time of "
        "25 interleaved rounds. Networks are those of fast.md, as `balanced` and `fast` had them. Float: weights widened; dynamic: activations rounded to 8 bits while running, where our "
        "lowering uses such a kernel; static: on grids from calibration. From all rows together three figures are reckoned "
        "for each kind, none below 0, which builds read: what a layer takes whatever its size, what a thousand of its "
        "multiply-accumulates take, and what a thousand numbers take that it reads and writes.",
    )


if __name__ == "__main__":
    main()
