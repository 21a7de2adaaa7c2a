"""What the metric is taken on follows from facts: the engine, the model's arithmetic, the data. Never from time."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeship.core.inventory import Inventory, OpCost
from edgeship.core.model import Signature, Source, TensorSpec, TorchModel
from edgeship.core.passes import Context
from edgeship.core.profile import DataRef, Request
from edgeship.core.registry import profiles, runtimes, targets
from edgeship.errors import DataError, UsageError
from edgeship.passes.check.accuracy import LEAST, CheckAccuracy, affordable_samples
from edgeship.passes.lower.torch_to_onnx import TorchToOnnx
from edgeship.program.export import make_program

SOURCE = Source(Path("m.py"), Signature((), ()), "0", form="torch", reference="m.py:f")


def request(runtime: str, macs: int) -> Request:
    inventory = Inventory((), (OpCost("l", "linear", macs, 1, 1),), 1)
    data = DataRef("d.npz", "1")
    return Request(
        SOURCE, targets()["galaxy-s24"], runtime, profiles()["balanced"], inventory, evaluation=data, load={}
    )


@pytest.mark.parametrize("runtime", ["onnx", "tflite", "coreml", "coreai", "qnn"])
def test_how_many_samples_follows_from_engine_and_arithmetic(runtime):
    small, large, huge = (affordable_samples(request(runtime, macs)) for macs in (10**6, 15 * 10**8, 10**12))
    most = runtimes()[runtime].engine.eval_samples
    assert small == most
    assert large == max(LEAST, most // 3)
    assert huge == LEAST
    assert most == 2000 if runtimes()[runtime].engine.execution == "native" else most <= 500
    task = CheckAccuracy.plan(request(runtime, 15 * 10**8))
    assert isinstance(task, CheckAccuracy)
    assert task.limit == large
    assert affordable_samples(dataclasses.replace(request(runtime, 1), inventory=None)) == most


@pytest.mark.parametrize(
    ("metric", "max_drop", "gate"),
    [
        (None, None, 0.005), ("accuracy", None, 0.005), ("perplexity", None, 0.005), ("snr", None, None),
        ("cosine", None, None), ("m.py:f", None, None), ("snr", 0.01, 0.01), ("accuracy", 0.1, 0.1),
    ],
)  # fmt: skip
def test_a_profile_gates_what_its_share_is_a_share_of(metric, max_drop, gate):
    """Half a point of accuracy says nothing of decibels: --metric snr alone measures, and starts no repairs."""
    asked = dataclasses.replace(request("onnx", 10**6), metric=metric, max_drop=max_drop)
    task = CheckAccuracy.plan(asked)
    assert isinstance(task, CheckAccuracy)
    assert task.max_drop == gate
    assert task.metric == (metric or "accuracy")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    base = tmp_path_factory.mktemp("accuracy")
    torch.manual_seed(0)
    program = make_program(nn.Linear(8, 3), [TensorSpec("x", "f32", (1, 8))], [torch.randn(1, 8)], output_names=["y"])
    program.save(base / "program")
    original = TorchModel(base / "program", program.signature)
    (base / "out").mkdir()
    artifact = TorchToOnnx().run(original, Context(base / "out"))
    inputs = np.random.default_rng(0).standard_normal((150, 8)).astype(np.float32)
    right = (inputs @ program.weights["weight"].numpy().T + program.weights["bias"].numpy()).argmax(1)
    wrong = np.arange(150) % 5 == 0
    np.savez(base / "data.npz", x=inputs, label=np.where(wrong, (right + 1) % 3, right))
    np.savez(base / "bare.npz", x=inputs)

    def go(**options):
        data = DataRef(str(base / options.pop("data", "data.npz")), "")
        task = CheckAccuracy("onnx", data, **options)
        task.confirm(request("onnx", 1))
        return task.run(artifact, original, Context(base))

    return go


def test_every_sample_counts_however_long_it_takes(case, monkeypatch):
    clock = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    verdict = case()
    assert verdict.passed
    assert verdict.summary == "accuracy 80.00% against 80.00% of the original, on 150 samples"
    assert verdict.measurement("accuracy").runs == 150
    assert verdict.measurement("accuracy_drop").value == 0


def test_the_limit_can_be_set_and_is_spread_over_the_data(case):
    verdict = case(limit=30)
    assert verdict.measurement("accuracy").runs == 30
    assert "on 30 samples" in verdict.summary
    for limit in (0, -1):
        with pytest.raises(UsageError, match="limit must be at least 1"):
            case(limit=limit)


def test_a_drop_beyond_what_is_allowed_fails(case):
    assert case(metric="snr", max_drop=1e-6).passed
    verdict = case(max_drop=-0.1)
    assert not verdict.passed
    assert "a drop of 0.00%, -10.00% allowed" in verdict.summary
    assert verdict.fix


def test_data_without_labels_is_an_error_only_where_the_figure_was_asked_for(case):
    assert case(data="bare.npz").summary == "the evaluation data has no labels: no accuracy"
    with pytest.raises(DataError, match="has no labels, and accuracy needs them"):
        case(data="bare.npz", required=True)
    assert case(data="bare.npz", metric="snr", required=True).measurement("snr").unit == "dB"
