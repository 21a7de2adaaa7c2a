"""lower/torch_to_zipgraph: a torch program to a graph in a zip file."""

from __future__ import annotations

import io
import json
import operator
import zipfile
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from edgeship.core.encodings import EncodedTensor, short_name
from edgeship.core.model import Placement, TorchModel
from edgeship.core.passes import Context, Pass, Skip
from edgeship.core.planning import other_runtime
from edgeship.core.profile import Request
from edgeship.core.weights import AffineTensor, FloatTensor
from edgeship.errors import LoweringError, UnsupportedOpError
from edgeship_zipgraph.model import ZipGraphModel


@dataclass(frozen=True)
class TorchToZipGraph(Pass):
    """Write a zip file with the graph in JSON and each weight as it was decided."""

    name: ClassVar[str] = "lower/torch_to_zipgraph"
    tools: ClassVar[tuple[str, ...]] = ("torch", "numpy")

    @classmethod
    def plan(cls, request: Request) -> Self | Skip:
        """Itself for the runtime that opens what it writes."""
        if reason := other_runtime(request, ZipGraphModel):
            return Skip(reason)
        return cls()

    def run(self, model: TorchModel, ctx: Context) -> ZipGraphModel:
        """Write ``model.zipgraph``. Raises `UnsupportedOpError` for a node that JSON cannot say."""
        from edgeship.program.program import TorchProgram

        program = TorchProgram.open(model)
        exported = program.exported
        signature = exported.graph_signature
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        weights = {node: program.record.aliases.get(name, name) for node, name in held.items()}
        nodes = [_described(node) for node in exported.graph.nodes if node.op == "call_function"]
        graph = {"inputs": list(signature.user_inputs), "nodes": nodes, "outputs": list(signature.user_outputs)}
        path = ctx.folder / f"model{ZipGraphModel.suffix}"
        with zipfile.ZipFile(path, "w") as file:
            stored = {}
            for name in sorted(set(weights.values())):
                tensor = program.encoded.get(name) or FloatTensor(program.weight(name).numpy())
                stored[name] = _write(file, f"weights/{len(stored)}", tensor)
            text = json.dumps({**graph, "weights": weights, "stored": stored}, sort_keys=True)
            _add(file, "graph.json", text.encode())
        placements = tuple(Placement(name, name) for name in program.encoded)
        return ZipGraphModel(path, program.signature, files=(path.name,), placements=placements)

    def ensures(self, output: ZipGraphModel, **inputs: Any) -> None:
        """Every weight that compression decided has a place in the file."""
        from edgeship.program.program import read_record

        missing = read_record(inputs["model"]).encodings.keys() - {place.weight for place in output.placements}
        if missing:
            raise LoweringError(f"{min(missing)} is not in {output.path.name}", fix="report this as a bug")


def _described(node: Any) -> dict[str, Any]:
    """One node as JSON has it."""
    name = "getitem" if node.target is operator.getitem else str(node.target)
    if name != "getitem" and not name.startswith("aten."):
        raise UnsupportedOpError(f"zipgraph has no {name} ({node.name})", fix="leave zipgraph out with --runtime")
    given = {key: _plain(value, node) for key, value in node.kwargs.items()}
    return {"name": node.name, "op": name, "args": [_plain(value, node) for value in node.args], "kwargs": given}


def _plain(value: Any, node: Any) -> Any:
    """An argument as JSON has it: other nodes by their names, dtypes by theirs."""
    import torch

    if isinstance(value, torch.fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return [_plain(item, node) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UnsupportedOpError(
        f"zipgraph cannot write {value!r} ({node.name}: {node.target})", fix="leave zipgraph out with --runtime"
    )


def _write(file: zipfile.ZipFile, place: str, tensor: EncodedTensor) -> dict[str, Any]:
    """Store a weight: an array for each of its parts; integers of any width take a byte each."""
    import numpy as np

    for role, array in tensor.arrays().items():
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(array))
        _add(file, f"{place}/{role}.npy", buffer.getvalue())
    encoding = tensor.encoding
    encoding = replace(encoding, bits=8) if isinstance(tensor, AffineTensor) else encoding
    return {"place": place, "roles": sorted(tensor.arrays()), "encoding": short_name(encoding)}


def _add(file: zipfile.ZipFile, name: str, data: bytes) -> None:
    """An entry without a date, so that the same model gives the same bytes."""
    file.writestr(zipfile.ZipInfo(name), data)
