"""Programs and artifacts that several folders of tests share; each is made once a session."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeship.core.model import TensorSpec, TFLiteModel, TorchModel
from edgeship.core.passes import Context
from edgeship.core.weights import EncodedTensor
from edgeship.program.program import TorchProgram


@pytest.fixture(scope="session")
def layers_program() -> TorchProgram:
    """One small program with every kind of layer that has a weight: inputs x and ids, outputs image and text."""
    import torch
    from torch import nn
    from torch.nn import functional

    from edgeship.program.export import make_program

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 3, 2, 1)
            self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
            self.pointwise = nn.Conv2d(32, 64, 1)
            self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=4, bias=False)
            self.up = nn.ConvTranspose2d(64, 16, 2, 2)
            self.wave = nn.Conv1d(16, 32, 3, padding=1)
            self.first = nn.Linear(32, 64)
            self.second = nn.Linear(64, 32, bias=False)
            self.scale = nn.Parameter(torch.rand(64) + 0.5)
            self.words = nn.Embedding(40, 32)

        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = functional.relu6(self.depthwise(functional.relu(self.stem(x))))
            x = self.pointwise(x)
            x = self.wave(self.up(x + self.grouped(x)).flatten(2)).transpose(1, 2)
            # The product would be folded into the weight by a converter that sees the weight.
            x = self.second(self.first(x) * self.scale)
            return x, functional.linear(self.words(ids), self.words.weight)

    torch.manual_seed(0)
    model = Layers()
    for parameter in model.parameters():
        parameter.data.mul_(2.0)
    inputs = [TensorSpec("x", "f32", (1, 3, 16, 16)), TensorSpec("ids", "i64", (1, 5), low=0, high=39)]
    examples = [torch.randn(1, 3, 16, 16), torch.tensor([[3, 1, 39, 0, 7]])]
    return make_program(model, inputs, examples, output_names=["image", "text"])


@pytest.fixture(scope="session")
def with_encoded() -> Callable[[TorchProgram, dict[str, EncodedTensor]], TorchProgram]:
    """A program with the given weights decided."""

    def encode(program: TorchProgram, encoded: dict[str, EncodedTensor]) -> TorchProgram:
        encodings = {name: tensor.encoding for name, tensor in encoded.items()}
        record = dataclasses.replace(program.record, encodings=encodings)
        return dataclasses.replace(program, encoded=encoded, record=record)

    return encode


@pytest.fixture(scope="session")
def lower_to_tflite(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TFLiteModel]:
    """Save a program and lower it: ``lower(program, activations="float")``."""
    from edgeship.passes.lower.torch_to_tflite import TorchToTFLite

    def lower(program: TorchProgram, activations: str = "float", folder: Path | None = None) -> TFLiteModel:
        base = tmp_path_factory.mktemp("tflite")
        program.save(base / "program")
        folder = folder or base / "out"
        folder.mkdir(exist_ok=True)
        model = TorchModel(base / "program", program.signature)
        step = TorchToTFLite(activations=activations)  # type: ignore[arg-type]
        artifact = step.run(model, Context(folder))
        step.ensures(artifact, model=model)
        return artifact

    return lower
