"""Compiling for Hexagon: what is written, what is refused, and the rewrites that make a graph whole and right."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeship.compression.affine import quantize_nearest, to_float16
from edgeship.compression.calibrate import decide_activations
from edgeship.core.model import OnnxModel, QnnModel, Signature, Source, TensorSpec, TorchModel
from edgeship.core.passes import Context, Skip
from edgeship.core.profile import Request
from edgeship.core.registry import profiles, targets
from edgeship.core.weights import Affine, same_numbers
from edgeship.data.batches import generate_batches
from edgeship.errors import EncodingError, LoweringError, UnsupportedOpError
from edgeship.lowering.qnn.compiler import Compiler
from edgeship.lowering.qnn.embedding import row_multiples
from edgeship.lowering.qnn.provider import Hexagon
from edgeship.passes.lower.onnx_to_qnn import OnnxToQnn
from edgeship.passes.lower.torch_to_onnx import TorchToOnnx
from edgeship.program.compare import Comparison, Reference
from edgeship.program.export import make_program
from edgeship.program.program import TorchProgram
from edgeship.program.rewrites import for_static_activations
from edgeship.runtimes.qnn.compiled import read_compiled_weights
from edgeship.runtimes.qnn.runtime import RUNTIME

pytest.importorskip("onnxruntime_qnn")
GALAXY = OnnxToQnn(soc_model=57, htp_arch=75)


class Branches(nn.Module):
    """What has gone wrong on the HTP, each on a branch of its own, so that one compilation tries them all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.words = nn.Embedding(50, 16, padding_idx=0)
        self.norm = nn.LayerNorm(16, eps=1e-12)
        self.query = nn.Linear(16, 16)
        self.value = nn.Linear(16, 16)
        self.pool = nn.Linear(16, 8)
        self.norm.weight.data.normal_(1, 0.2)
        self.norm.bias.data.normal_(0, 0.2)

    def forward(self, image: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = functional.relu6(self.depthwise(self.conv(image)) * 8)
        clipped = self.up(x).clamp(-0.3, 0.4)
        words = self.norm(self.words(ids))
        query, value = (layer(words).view(1, 6, 2, 8).transpose(1, 2) for layer in (self.query, self.value))
        read = functional.scaled_dot_product_attention(query, query, value, mask[:, None, None, :].bool())
        read = read.transpose(1, 2).reshape(1, 6, 16)
        root = read * torch.rsqrt(read.pow(2).mean(-1, keepdim=True) + 1e-3)
        return clipped, functional.gelu(root), torch.tanh(self.pool(read[:, 0]))


@pytest.fixture(scope="module")
def branches() -> TorchProgram:
    torch.manual_seed(0)
    specs = [
        TensorSpec("image", "f32", (1, 3, 8, 8)),
        TensorSpec("ids", "i64", (1, 6), low=0, high=49),
        TensorSpec("mask", "i64", (1, 6), low=0, high=1),
    ]
    examples = [torch.randn(1, 3, 8, 8), torch.tensor([[0, 5, 49, 3, 3, 8]]), torch.tensor([[1, 1, 1, 1, 0, 0]])]
    return make_program(Branches(), specs, examples, output_names=["clipped", "gelu", "pooled"])


def decided(program: TorchProgram, weights: str, bits: int | None) -> TorchProgram:
    encoded: dict[str, Any] = {}
    for use in program.record.inventory.weights:
        if use.op != "other":
            weight = program.weights[use.name]
            form = Affine(4) if weights == "int4" and use.op != "embedding" else Affine(8)
            encoded[use.name] = (
                to_float16(weight) if weights == "float16" else quantize_nearest(weight, form, axis=use.channel_axis)
            )
    encodings = {name: tensor.encoding for name, tensor in encoded.items()}
    record = dataclasses.replace(program.record, encodings=encodings)
    program = dataclasses.replace(program, encoded=encoded, record=record)
    if bits is None:
        return program
    program = for_static_activations(program, bits)
    batches = generate_batches(program.signature, 4)
    activations = decide_activations(program, batches, bits=bits, method="mse" if bits == 8 else "minmax")
    return dataclasses.replace(program, record=dataclasses.replace(program.record, activations=activations))


def to_onnx(program: TorchProgram, folder: Path) -> OnnxModel:
    program.save(folder / "program")
    (folder / "onnx").mkdir()
    return TorchToOnnx().run(TorchModel(folder / "program", program.signature), Context(folder / "onnx"))


def to_qnn(program: TorchProgram, folder: Path) -> QnnModel:
    (folder / "qnn").mkdir()
    return GALAXY.run(to_onnx(program, folder), Context(folder / "qnn"))


@pytest.mark.parametrize(
    ("weights", "bits", "to_reference", "to_cpu"),
    [("int8", 16, 50, 50), ("int8", 8, 18, 18), ("int4", 16, 40, 40), ("float16", None, 45, 45)],
)
def test_the_whole_graph_is_compiled_and_right(
    branches: TorchProgram, tmp_path: Path, weights: str, bits: int | None, to_reference: float, to_cpu: float
) -> None:
    program = decided(branches, weights, bits)
    artifact = to_qnn(program, tmp_path)
    names = {"model.qdq.onnx", "model_ctx.onnx", "model_ctx_qnn.bin", "model.dlc"}
    assert {Path(name).name for name in artifact.files} == names
    assert all((tmp_path / "qnn" / name).stat().st_size > 0 for name in artifact.files)
    assert artifact.compute == ("f16" if bits is None else "int")
    reference, cpu = Comparison(), Comparison()
    wanted = Reference(program)
    with RUNTIME.open(artifact) as session:
        for index, batch in enumerate(generate_batches(program.signature, 2, seed=5)):
            batch["mask"][0, 4:] = index
            found = session.run(batch)
            reference.add(wanted.run(batch), found)
            cpu.add(session.run_on_cpu(batch), found)
    assert {name: output.snr_db for name, output in reference.outputs.items() if output.snr_db < to_reference} == {}
    assert {name: output.snr_db for name, output in cpu.outputs.items() if output.snr_db < to_cpu} == {}
    in_graph, compiled = RUNTIME.read_weights(artifact), read_compiled_weights(artifact)
    assert {name: same_numbers(tensor, in_graph[name]) for name, tensor in program.encoded.items()} == dict.fromkeys(
        program.encoded, ""
    )
    if bits is not None:
        assert {name: same_numbers(tensor, compiled[name]) for name, tensor in program.encoded.items()} == (
            dict.fromkeys(program.encoded, "")
        )


class Small(nn.Module):
    def __init__(self, after: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.after = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.layer(x))


def small(after: Callable[[torch.Tensor], torch.Tensor]) -> TorchProgram:
    torch.manual_seed(0)
    return make_program(Small(after), [TensorSpec("x", "f32", (1, 16))], [torch.randn(1, 16)])


class WithNothing(nn.Module):
    """Nothing, as models begin their sums over experts, and something."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.after = nn.Linear(16, 16), nn.Linear(16, 16)
        self.nothing = nn.Parameter(torch.zeros(1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.nothing + self.layer(x) * 0.7)


def test_a_sum_with_nothing_does_not_wrap_around(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = make_program(WithNothing(), [TensorSpec("x", "f32", (1, 16))], [torch.randn(1, 16)])
    program = decided(program, "int8", 16)
    artifact, found = to_qnn(program, tmp_path), Comparison()
    with RUNTIME.open(artifact) as session:
        for batch in generate_batches(program.signature, 2, seed=5):
            found.add(Reference(program).run(batch), session.run(batch))
    assert min(output.snr_db for output in found.outputs.values()) > 50


def test_two_builds_in_two_folders_give_the_same_bytes(tmp_path: Path) -> None:
    program = decided(small(torch.relu), "int8", 16)
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        artifact = to_qnn(program, tmp_path / name)
        contents.append({file: (tmp_path / name / "qnn" / file).read_bytes() for file in artifact.files})
    assert contents[0].keys() == contents[1].keys()
    assert [file for file in contents[0] if contents[0][file] != contents[1][file]] == []


def test_an_operator_off_the_htp_is_named(tmp_path: Path) -> None:
    program = decided(small(torch.erf), "int8", 16)
    with pytest.raises(UnsupportedOpError, match=r"Hexagon does not run Erf \(erf\)"):
        to_qnn(program, tmp_path)


def test_a_compiler_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    graph = to_onnx(decided(small(torch.relu), "int8", 16), tmp_path)
    with pytest.raises(LoweringError, match=r"did not finish in 0\.01 s"):
        Compiler(graph.path, Hexagon(57, 75), 0.01, lambda line: None).write_context("model_ctx.onnx")


def test_a_crash_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = to_onnx(decided(small(torch.relu), "int8", 16), tmp_path)
    # A child that cannot import onnxruntime stands for one that dies before it answers.
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "onnxruntime_qnn.py").write_text("import os, sys; sys.stderr.write('out of memory\\n'); os.abort()")
    monkeypatch.syspath_prepend(str(broken))
    with pytest.raises(LoweringError, match=r"ended with code -6 during compile: out of memory"):
        Compiler(graph.path, Hexagon(57, 75), 60, lambda line: None).write_context("model_ctx.onnx")


def test_planning() -> None:
    source = Source(Path("model.py"), Signature((), ()), reference="model.py:f")
    galaxy, iphone = targets()["galaxy-s24"], targets()["iphone15pro"]
    assert OnnxToQnn.plan(Request(source, galaxy, "qnn", profiles()["balanced"])) == GALAXY
    for target, runtime, reason in ((galaxy, "onnx", "only for runtime qnn"), (iphone, "qnn", "no Hexagon")):
        skipped = OnnxToQnn.plan(Request(source, target, runtime, profiles()["balanced"]))
        assert isinstance(skipped, Skip)
        assert reason in skipped.reason


def test_row_scales_are_kept_exactly_or_refused() -> None:
    scales = np.float16(np.random.default_rng(0).uniform(0.01, 0.1, 1000)).astype(np.float32)
    multiples, unit = row_multiples(scales, "words")
    assert multiples.dtype == np.uint16
    assert np.array_equal(multiples.astype(np.float32) * np.float32(unit), scales)
    with pytest.raises(EncodingError, match="row scales of words"):
        row_multiples(np.array([1.0, 0.001], np.float16).astype(np.float32), "words")
