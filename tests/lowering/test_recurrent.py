"""Recurrent weights in 8 bits: the same integers in every runtime's file, and the answers of the reference."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeship.compression.affine import quantize_nearest
from edgeship.compression.calibrate import decide_activations
from edgeship.core.encodings import encoding_named, fitted
from edgeship.core.inventory import WeightUse
from edgeship.core.model import TensorSpec, TorchModel
from edgeship.core.passes import Context
from edgeship.core.registry import runtimes
from edgeship.core.weights import Affine, Palette, same_numbers
from edgeship.data.batches import generate_batches
from edgeship.passes.lower.torch_to_coreai import TorchToCoreAI
from edgeship.passes.lower.torch_to_coreml import TorchToCoreML
from edgeship.passes.lower.torch_to_onnx import TorchToOnnx
from edgeship.passes.lower.torch_to_tflite import TorchToTFLite
from edgeship.program.compare import Reference
from edgeship.program.export import make_program
from edgeship.program.program import TorchProgram
from edgeship.program.rewrites import for_static_activations

STEPS: dict[str, Callable[[], Any]] = {
    "onnx": lambda: TorchToOnnx("float"),
    "tflite": lambda: TorchToTFLite("float"),
    "coreml": TorchToCoreML,
    "coreai": TorchToCoreAI,
}
# The worst ratio to the reference in dB: two engines compute in float16.
LEAST_DB = {"onnx": 90.0, "tflite": 90.0, "coreml": 45.0, "coreai": 45.0}


class Sequences(nn.Module):
    """Two recurrent layers of each kind, one of them two-way, behind another of its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(32, 16, batch_first=True)
        self.rnn = nn.RNN(16, 16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.rnn(self.gru(self.lstm(x)[0])[0])[0]
        return answer


def made(static: bool = False) -> TorchProgram:
    """The program with every recurrent weight in 8 bits, and on grids where ``static``."""
    torch.manual_seed(0)
    program = make_program(Sequences().eval(), [TensorSpec("x", "f32", (1, 5, 24))], [torch.randn(1, 5, 24)])
    program = for_static_activations(program, 8) if static else program
    encoded = {
        use.name: quantize_nearest(program.weight(use.name), Affine(8), axis=use.channel_axis)
        for use in program.record.inventory.weights
        if use.op == "recurrent"
    }
    # Per direction and layer one of what comes in, and one of the state.
    assert len(encoded) == 2 * (2 * 2 + 1 + 1)
    record = dataclasses.replace(program.record, encodings={name: item.encoding for name, item in encoded.items()})
    program = dataclasses.replace(program, encoded=encoded, record=record)
    if not static:
        return program
    grids = decide_activations(program, generate_batches(program.signature, 4), bits=8)
    return dataclasses.replace(program, record=dataclasses.replace(program.record, activations=grids))


def lowered(program: TorchProgram, step: Any, folder: Path) -> Any:
    program.save(folder / "program")
    (folder / "out").mkdir()
    return step.run(TorchModel(folder / "program", program.signature), Context(folder / "out"))


@pytest.mark.parametrize("name", sorted(STEPS))
def test_the_integers_are_in_the_file_and_the_answers_right(name: str, tmp_path: Path) -> None:
    program, runtime = made(), runtimes()[name]
    artifact = lowered(program, STEPS[name](), tmp_path)
    found = runtime.read_weights(artifact)
    assert {key: same_numbers(tensor, found[key]) for key, tensor in program.encoded.items()} == dict.fromkeys(
        program.encoded, ""
    )
    wanted = Reference(program)
    with runtime.open(artifact) as session:
        for batch in generate_batches(program.signature, 3):
            (one,), (other,) = wanted.run(batch).values(), session.run(batch).values()
            noise = float(np.square(np.float64(other) - one).sum())
            assert 10 * np.log10(float(np.square(np.float64(one)).sum()) / max(noise, 1e-30)) > LEAST_DB[name]


@pytest.mark.parametrize("name", ["onnx", "tflite"])
def test_among_static_activations_they_compute_in_float(name: str, tmp_path: Path) -> None:
    program, runtime = made(static=True), runtimes()[name]
    step = TorchToOnnx("int8") if name == "onnx" else TorchToTFLite("int8")
    artifact = lowered(program, step, tmp_path)
    found = runtime.read_weights(artifact)
    assert {key: same_numbers(tensor, found[key]) for key, tensor in program.encoded.items()} == dict.fromkeys(
        program.encoded, ""
    )
    wanted = Reference(program)
    with runtime.open(artifact) as session:
        for batch in generate_batches(program.signature, 3):
            (one,), (other,) = wanted.run(batch).values(), session.run(batch).values()
            np.testing.assert_allclose(other, one, atol=0.03)


def test_they_have_eight_bits_at_least() -> None:
    """What they lose comes back at every step, and no runtime has kernels for fewer bits."""
    use = WeightUse("w", "recurrent", (64, 32))
    assert [str(fitted(encoding_named(text), use)) for text in ("int8", "int4", "int4-g32", "int2-g32-asym")] == [
        "int8 per channel", "int8 per channel", "int8 per channel", "int8 per channel asymmetric",
    ]  # fmt: skip
    assert fitted(encoding_named("int4-tensor"), use) == Affine(8, granularity="tensor")
    assert fitted(Palette(4, 8), use) == Palette(4, 8)
    for runtime in (runtimes()[name] for name in ("onnx", "tflite", "coreml", "coreai")):
        assert not runtime.holds("recurrent", Affine(8), "float")
    assert not runtimes()["qnn"].holds("recurrent", Affine(8), "int16")
    assert "widened from 8 bits" in runtimes()["qnn"].holds("recurrent", Affine(4), "int16")
    assert runtimes()["onnx"].resident_bits("recurrent", Affine(8), "int8") == 32
