"""How long a layer takes in each arithmetic on this machine: ``python benchmarks/layer_times.py``.

Writes docs/results/layer-times.md. The facts about kernels in `edgeship/core/speed.toml` are read off it: whether
activations rounded while running, or static ones, are quicker than float for a kind of layer. Measured, not guessed while
building: on a machine with other work a build would decide by chance.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from results import write_page
from torch import nn

from edgeship.compression.affine import quantize_nearest
from edgeship.compression.calibrate import decide_activations
from edgeship.core.model import Artifact, TensorSpec, TorchModel
from edgeship.core.passes import Context
from edgeship.core.weights import Affine
from edgeship.passes.lower.torch_to_onnx import TorchToOnnx
from edgeship.passes.lower.torch_to_tflite import TorchToTFLite
from edgeship.program.export import make_program
from edgeship.program.program import TorchProgram
from edgeship.program.rewrites import for_static_activations

REPEATED = 4
ROUNDS = 25
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv 1x1, 64 ch, 56 px": (lambda: nn.Conv2d(64, 64, 1), (1, 64, 56, 56)),
    "conv 1x1, 256 ch, 14 px": (lambda: nn.Conv2d(256, 256, 1), (1, 256, 14, 14)),
    "conv 3x3, 64 ch, 28 px": (lambda: nn.Conv2d(64, 64, 3, 1, 1), (1, 64, 28, 28)),
    "conv 3x3 in 4 groups, 64 ch, 28 px": (lambda: nn.Conv2d(64, 64, 3, 1, 1, groups=4), (1, 64, 28, 28)),
    "depthwise 3x3, 96 ch, 28 px": (lambda: nn.Conv2d(96, 96, 3, 1, 1, groups=96), (1, 96, 28, 28)),
    "depthwise 5x5, 240 ch, 14 px": (lambda: nn.Conv2d(240, 240, 5, 1, 2, groups=240), (1, 240, 14, 14)),
    "linear 512, 1 row": (lambda: nn.Linear(512, 512), (1, 512)),
    "linear 384, 128 rows": (lambda: nn.Linear(384, 384), (1, 128, 384)),
}


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


def main() -> None:
    """Time every kind of layer and write the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    for runtime in ("onnx", "tflite"):
        for name, (make, shape) in LAYERS.items():
            with tempfile.TemporaryDirectory() as folder:
                runs = {}
                for mode in ("float", "dynamic", "int8"):
                    place = Path(folder) / mode
                    place.mkdir()
                    artifact = _lowered(_program(make, shape, mode), runtime, mode, place)
                    runs[mode] = once(artifact)
                found = race(runs)
            shown = [f"{found[mode] / REPEATED:.3f}" for mode in found]
            rows.append((runtime, name, *shown, min(found, key=found.__getitem__)))
            print(*rows[-1], flush=True)
    write_page(
        "layer-times",
        "Milliseconds of a layer by arithmetic",
        "python benchmarks/layer_times.py",
        ("onnxruntime", "ai-edge-litert"),
        ("runtime", "layer", "float", "dynamic", "static", "quickest"),
        rows,
        before="One thread, weights in 8 bits per channel, four layers in a row with a ReLU6 behind each; the median over "
        "25 interleaved rounds of the least time in a round. Float: weights widened; dynamic: activations rounded to 8 "
        "bits while running; static: on grids from calibration.",
    )


if __name__ == "__main__":
    main()
