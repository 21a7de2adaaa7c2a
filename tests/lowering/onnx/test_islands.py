"""Weights of layers that stay in float among static activations are widened at load, not at every run."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from edgeship.compression.affine import quantize_nearest
from edgeship.compression.calibrate import decide_activations
from edgeship.core.choice import Choice
from edgeship.core.model import Source, TensorSpec, TorchModel
from edgeship.core.passes import Context
from edgeship.core.profile import DataRef, Profile, Request
from edgeship.core.registry import profiles, targets
from edgeship.core.weights import Affine, same_numbers
from edgeship.data.batches import generate_batches
from edgeship.passes.lower.torch_to_onnx import TorchToOnnx
from edgeship.program.compare import Reference
from edgeship.program.export import make_program
from edgeship.program.rewrites import for_static_activations
from edgeship.runtimes.onnxruntime import RUNTIME


class Words(nn.Module):
    """Two tables of words, and layers behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.coarse = nn.Embedding(40, 16), nn.Embedding(40, 16)
        self.first, self.second, self.last = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.last(torch.relu(self.first(self.plain(ids)) + self.second(self.coarse(ids))))
        return answer


def test_layers_without_a_grid_compute_as_in_a_float_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = TensorSpec("ids", "i64", (1, 6), low=0, high=39)
    program = for_static_activations(make_program(Words().eval(), [spec], [torch.arange(6)[None]]), 8)
    encoded = {
        use.name: quantize_nearest(program.weights[use.name], Affine(8), axis=use.channel_axis)
        for use in program.record.inventory.weights
        if use.op != "other"
    }
    plain = [
        node.name
        for node in program.exported.graph.nodes
        if "embedding" in node.name and any("plain" in arg.name for arg in node.all_input_nodes)
    ]
    assert len(plain) == 1
    batches = generate_batches(program.signature, 4)
    grids = decide_activations(program, batches, bits=8, method="minmax", floats=frozenset(plain))
    assert plain[0] not in grids
    record = dataclasses.replace(
        program.record, encodings={name: item.encoding for name, item in encoded.items()}, activations=grids
    )
    program = dataclasses.replace(program, encoded=encoded, record=record)
    program.save(tmp_path / "program")
    (tmp_path / "out").mkdir()
    artifact = TorchToOnnx("int8").run(TorchModel(tmp_path / "program", program.signature), Context(tmp_path / "out"))
    graph = onnx.load(artifact.path).graph
    stored = {item.weight: item.stored for item in artifact.placements}
    readers = {name: {node.op_type for node in graph.node if stored[name] in node.input} for name in stored}
    assert readers == {
        "plain.weight": {"Gather"},
        "first.weight": {"Cast"},
        "coarse.weight": {"DequantizeLinear"},
        "second.weight": {"DequantizeLinear"},
        "last.weight": {"DequantizeLinear"},
    }
    found = RUNTIME.read_weights(artifact)
    assert {name: same_numbers(tensor, found[name]) for name, tensor in encoded.items()} == dict.fromkeys(encoded, "")
    wanted = Reference(program)
    with RUNTIME.open(artifact) as session:
        for batch in batches:
            (one,), (other,) = wanted.run(batch).values(), session.run(batch).values()
            np.testing.assert_allclose(other, one, atol=0.02 * float(np.abs(one).max()))


def test_rows_of_tables_are_taken_before_they_are_widened(tmp_path: Path) -> None:
    """``DequantizeLinear -> Gather`` would widen the whole table at every run, which a compiler may want all the same."""
    torch.manual_seed(0)
    spec = TensorSpec("ids", "i64", (1, 6), low=0, high=39)
    program = for_static_activations(make_program(Words().eval(), [spec], [torch.arange(6)[None]]), 8)
    encoded = {
        use.name: quantize_nearest(program.weights[use.name], Affine(8), axis=use.channel_axis)
        for use in program.record.inventory.weights
        if use.op != "other"
    }
    batches = generate_batches(program.signature, 4)
    grids = decide_activations(program, batches, bits=8, method="minmax")
    record = dataclasses.replace(
        program.record, encodings={name: item.encoding for name, item in encoded.items()}, activations=grids
    )
    program = dataclasses.replace(program, encoded=encoded, record=record)
    program.save(tmp_path / "program")
    readers, answers = {}, []
    for packed in (True, False):
        folder = tmp_path / str(packed)
        folder.mkdir()
        model = TorchModel(tmp_path / "program", program.signature)
        artifact = TorchToOnnx("int8", packed_rows=packed).run(model, Context(folder))
        graph = onnx.load(artifact.path).graph
        stored = next(item.stored for item in artifact.placements if item.weight == "plain.weight")
        readers[packed] = {node.op_type for node in graph.node if stored in node.input}
        found = RUNTIME.read_weights(artifact)
        assert {name: same_numbers(tensor, found[name]) for name, tensor in encoded.items()} == dict.fromkeys(
            encoded, ""
        )
        with RUNTIME.open(artifact) as session:
            answers.append([next(iter(session.run(batch).values())) for batch in batches])
    assert readers == {True: {"Gather"}, False: {"DequantizeLinear"}}
    assert all(np.array_equal(one, other) for one, other in zip(*answers, strict=True))


def test_only_what_runs_the_file_itself_has_rows_taken_packed() -> None:
    """Hexagon's compiler looks for the dequantized table."""
    spec = TensorSpec("ids", "i64", (1, 6), low=0, high=39)
    made = make_program(Words().eval(), [spec], [torch.arange(6)[None]]).record.inventory
    own = Profile("own", "", Choice("int8", "int8"))
    source = Source(Path("m.py"), (), reference="m.py:f")
    data = DataRef("data.npz", "0")
    for runtime, target, packed in (("onnx", "linux-x86", True), ("qnn", "galaxy-s24", False)):
        step = TorchToOnnx.plan(Request(source, targets()[target], runtime, own, made, data))
        assert step == TorchToOnnx("int8", packed_rows=packed)
    step = TorchToOnnx.plan(Request(source, targets()["linux-x86"], "onnx", profiles()["balanced"], made, data))
    assert step == TorchToOnnx("float")
