"""A small trained-like program, saved, with calibration data; and requests for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeship.core.model import Source, TensorSpec, TorchModel
from edgeship.core.profile import DataRef, Request
from edgeship.core.registry import profiles, targets
from edgeship.data.batches import describe_data
from edgeship.program.export import make_program
from edgeship.program.program import read_record


@pytest.fixture(scope="package")
def saved(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    """Two convolutions, a norm and three linear layers; input ``image`` (1, 4, 8, 8), output logits."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(), nn.Flatten(),
        nn.LayerNorm(144), nn.Linear(144, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5),
    )  # fmt: skip
    spec = TensorSpec("image", "f32", (1, 4, 8, 8))
    program = make_program(net, [spec], [torch.randn(1, 4, 8, 8)], output_names=["logits"])
    folder = tmp_path_factory.mktemp("compress")
    program.save(folder)
    return TorchModel(folder, program.signature)


@pytest.fixture(scope="package")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> DataRef:
    """48 samples with channels of unlike size, and labels."""
    path = tmp_path_factory.mktemp("data") / "calibration.npz"
    random = np.random.default_rng(0)
    sizes = np.array([0.2, 1.0, 3.0, 0.5]).reshape(1, 4, 1, 1)
    image = (random.standard_normal((48, 4, 8, 8)) * sizes).astype(np.float32)
    np.savez(path, image=image, label=random.integers(0, 5, 48))
    return describe_data(str(path))


@pytest.fixture(scope="package")
def request_for(saved: TorchModel) -> Callable[..., Request]:
    """``request_for("onnx", "balanced", options={...}, calibration=...)`` with the program's inventory."""

    def make(runtime: str = "onnx", profile: str = "balanced", **fields: object) -> Request:
        source = Source(Path("model.py"), (), reference="model.py:f")  # type: ignore[arg-type]
        target = targets()["galaxy-s24" if runtime == "qnn" else "iphone15pro"]
        request = Request(source, target, runtime, profiles()[profile], read_record(saved).inventory)
        return dataclasses.replace(request, **fields)  # type: ignore[arg-type]

    return make
