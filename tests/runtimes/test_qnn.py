"""The QNN runtime: what it holds, and damaged artifacts."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeship.compression.affine import quantize_nearest
from edgeship.compression.calibrate import decide_activations
from edgeship.core.model import QnnModel, TensorSpec, TorchModel
from edgeship.core.passes import Context
from edgeship.core.weights import Affine, Float
from edgeship.data.batches import generate_batches
from edgeship.errors import ArtifactError, DataError
from edgeship.passes.lower.onnx_to_qnn import OnnxToQnn
from edgeship.passes.lower.torch_to_onnx import TorchToOnnx
from edgeship.program.export import make_program
from edgeship.runtimes.qnn.compiled import parse_saver
from edgeship.runtimes.qnn.emulator import Emulator
from edgeship.runtimes.qnn.runtime import RUNTIME

pytest.importorskip("onnxruntime_qnn")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> QnnModel:
    torch.manual_seed(0)
    program = make_program(nn.Linear(16, 4), [TensorSpec("x", "f32", (1, 16))], [torch.randn(1, 16)])
    encoded = {"weight": quantize_nearest(program.weight("weight"), Affine())}
    record = replace(program.record, encodings={"weight": Affine()})
    program = replace(program, encoded=encoded, record=record)
    activations = decide_activations(program, generate_batches(program.signature, 3), bits=16, method="minmax")
    program = replace(program, record=replace(record, activations=activations))
    base = tmp_path_factory.mktemp("qnn")
    program.save(base / "program")
    (base / "onnx").mkdir()
    graph = TorchToOnnx().run(TorchModel(base / "program", program.signature), Context(base / "onnx"))
    (base / "out").mkdir()
    return OnnxToQnn(57, 75).run(graph, Context(base / "out"))


def inputs(**arrays: object) -> dict[str, np.ndarray]:
    return {"x": np.ones((1, 16), np.float32), **arrays}  # type: ignore[dict-item]


def test_one_child_answers_many_runs(artifact: QnnModel) -> None:
    with RUNTIME.open(artifact) as session:
        first, second = session.run(inputs()), session.run(inputs(x=np.zeros((1, 16), np.float32)))
        assert np.array_equal(first["output"], session.run(inputs())["output"])
        assert not np.array_equal(first["output"], second["output"])
        np.testing.assert_allclose(session.run_on_cpu(inputs())["output"], first["output"], atol=2e-3)


def test_wrong_inputs_are_named(artifact: QnnModel) -> None:
    with RUNTIME.open(artifact) as session:
        with pytest.raises(DataError, match="input x is missing"):
            session.run({})
        with pytest.raises(DataError, match=r"x has shape \(1, 15\)"):
            session.run(inputs(x=np.ones((1, 15), np.float32)))


def damaged(artifact: QnnModel, folder: Path, name: str, content: bytes | None) -> QnnModel:
    shutil.copytree(artifact.path, folder / "copy")
    place = folder / "copy" / name
    if content is None:
        place.unlink()
    else:
        place.write_bytes(content)
    return replace(artifact, path=folder / "copy")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model_ctx_qnn.bin", b"rubbish"),
        ("model_ctx_qnn.bin", None),
        ("model_ctx.onnx", b"rubbish"),
        ("model_ctx.onnx", None),
    ],
)
def test_a_damaged_context_is_one_clear_error(
    artifact: QnnModel, tmp_path: Path, name: str, content: bytes | None
) -> None:
    with pytest.raises(ArtifactError, match="build again"):
        RUNTIME.open(damaged(artifact, tmp_path, name, content))


def test_a_damaged_graph_is_one_clear_error(artifact: QnnModel, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        RUNTIME.read_weights(damaged(artifact, tmp_path, "model.qdq.onnx", b"rubbish"))


def test_an_artifact_without_its_chip_is_refused(artifact: QnnModel) -> None:
    with pytest.raises(ArtifactError, match="which chip"):
        RUNTIME.open(replace(artifact, facts={}))


def test_a_child_that_died_is_reported(artifact: QnnModel) -> None:
    chip = {"soc_model": 57, "htp_arch": 75, "float16": False}
    emulator = Emulator(artifact.path / "model_ctx.onnx", chip)
    emulator._child.kill()
    emulator._child.wait()
    with pytest.raises(ArtifactError, match="emulator crashed"):
        emulator.run(inputs())
    emulator.close()


@pytest.mark.parametrize(
    ("encoding", "activations", "reason"),
    [
        (Affine(8), "int8", ""),
        (Affine(8), "int16", ""),
        (Affine(4), "int16", ""),
        (Affine(8, granularity="tensor"), "int8", ""),
        (Float(16), "float", ""),
        (Affine(8), "float", "integer activations"),
        (Affine(8), "dynamic", "while running"),
        (Affine(2), "int16", "silently wrong"),
        (Affine(4, granularity="group", group_size=32), "int16", ""),
        (Affine(4, granularity="group", group_size=32), "int8", "16-bit activations"),
        (Affine(4, granularity="group", group_size=8), "int16", "group sizes are"),
        (Affine(8, granularity="group", group_size=32), "int16", "4-bit weights"),
        (Affine(8, symmetric=False), "int8", "zero point 0"),
        (Float(16), "int16", "integer weights"),
    ],
)
def test_what_it_holds(encoding: Affine | Float, activations: str, reason: str) -> None:
    answer = RUNTIME.holds("linear", encoding, activations)  # type: ignore[arg-type]
    assert reason in answer
    assert bool(answer) == bool(reason)


def test_convolutions_in_short_integers_want_a_scale_a_channel() -> None:
    assert RUNTIME.holds("conv", Affine(4), "int8") == ""
    assert "one scale a channel" in RUNTIME.holds("conv", Affine(4, granularity="tensor"), "int8")
    assert "linear layers" in RUNTIME.holds("conv", Affine(4, granularity="group", group_size=32), "int16")


def test_embeddings_are_looked_up_in_8_bits() -> None:
    assert RUNTIME.holds("embedding", Affine(8), "int16") == ""
    assert "8 bits" in RUNTIME.holds("embedding", Affine(4), "int16")
    assert RUNTIME.container_bits("linear", Affine(3)) == 4


def test_saver_source_is_read_in_the_order_of_its_bytes() -> None:
    source = """
   uint32_t G_a_dims[] = {2, 3};
   Qnn_ScaleOffset_t G_a_quantizeParams_scaleOffsets[] = {{0.5, 0}, {0.25, 0}};
   fread(G_a_data, 1, 6, fp);
   Qnn_TensorV1_t G_a_v1 = {0, "first", (Qnn_TensorType_t)4, 0};
   uint32_t G_b_dims[] = {2};
   Qnn_QuantizeParams_t G_b_quantizeParams = {(Qnn_Definition_t)1, .scaleOffsetEncoding = {0.125, 0}};
   fread(G_b_data, 2, 2, fp);
   Qnn_TensorV1_t G_b_v1 = {0, "second", (Qnn_TensorType_t)4, 0};
"""
    found = parse_saver(source, bytes([1, 2, 3, 4, 5, 255, 7, 0, 8, 0]))
    assert found["first"].values.tolist() == [[1, 2, 3], [4, 5, -1]]
    assert found["first"].scales.tolist() == [0.5, 0.25]
    assert found["second"].values.tolist() == [7, 8]
    assert found["second"].scales.tolist() == [0.125]
