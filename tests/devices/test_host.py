"""Timing on this host happens in a process of its own; what cannot be timed says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeship.core.model import CoreMLModel, OnnxModel, Signature, TensorSpec
from edgeship.core.registry import runtimes
from edgeship.devices.host import MIN_RUNS, percentile, time_artifact
from edgeship.errors import ArtifactError

SIGNATURE = Signature((TensorSpec("x", "f32", (1, 256)),), (TensorSpec("y", "f32", (1, 256)),))


def onnx_file(folder: Path, megabytes: int = 0) -> OnnxModel:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    weights = [numpy_helper.from_array(np.eye(256, dtype=np.float32), "w")]
    if megabytes:
        rows = np.ones((megabytes * 2**20 // 1024, 256), np.float32)
        weights.append(numpy_helper.from_array(rows, "large"))
        nodes = [
            helper.make_node("ReduceSum", ["large"], ["sum"], keepdims=0),
            helper.make_node("Mul", ["x", "sum"], ["h"]),
            helper.make_node("MatMul", ["h", "w"], ["y"]),
        ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 256)) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    path = folder / f"m{megabytes}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return OnnxModel(path, SIGNATURE)


def test_percentiles():
    assert percentile([5, 1, 3, 2, 4], 50) == 3
    assert percentile([1, 2], 50) == 1.5
    assert percentile([7], 99) == 7
    assert percentile(list(range(101)), 90) == 90


def test_latency_and_memory_of_an_artifact(tmp_path):
    found = {item.name: item for item in time_artifact(onnx_file(tmp_path), seconds=0.05)}
    assert 0 < found["latency_p50"].value <= found["latency_p90"].value <= found["latency_p99"].value < 1000
    assert {item.how for item in found.values()} == {"measured"}
    assert found["latency_p50"].runs >= MIN_RUNS
    assert found["latency_p50"].unit == "ms"
    assert found["latency_p50"].versions.keys() == {"onnxruntime", "onnx"}
    assert found["peak_memory"].value > found["engine_memory"].value > 10**7


def test_peak_memory_is_the_models_own(tmp_path):
    ballast = np.ones((64, 2**20), np.float32)
    small = {item.name: item.value for item in time_artifact(onnx_file(tmp_path), seconds=0.02)}
    large = {item.name: item.value for item in time_artifact(onnx_file(tmp_path, 64), seconds=0.02)}
    assert ballast.nbytes == 2**28
    assert large["peak_memory"] - small["peak_memory"] > 50 * 2**20
    assert small["peak_memory"] < 250 * 2**20, "memory of this process was counted"


@pytest.mark.parametrize("name", [name for name, runtime in sorted(runtimes().items()) if runtime.engine.untimed])
def test_what_cannot_be_timed_says_why(name, tmp_path):
    artifact = runtimes()[name].artifact(tmp_path / "never_opened", SIGNATURE)
    (item,) = time_artifact(artifact)
    assert item.value is None
    assert item.note == runtimes()[name].engine.untimed
    assert item.runtime == name


def test_an_artifact_that_does_not_run_is_an_error(tmp_path):
    artifact = onnx_file(tmp_path)
    artifact.path.write_bytes(artifact.path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"m0\.onnx does not run"):
        time_artifact(artifact)


def test_core_ml_is_never_timed_by_an_evaluator():
    assert CoreMLModel.runtime == "coreml"
    assert runtimes()["coreml"].engine.untimed
