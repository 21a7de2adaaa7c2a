"""The runtime: opens ``.zipgraph`` files, runs them with torch, and reads their weights back."""

from __future__ import annotations

import io
import json
import operator
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgeship.core.encodings import EncodedTensor, Encoding, encoding_named
from edgeship.core.forms import Form, Forms, Lacks
from edgeship.core.inventory import WeightOp
from edgeship.core.model import Artifact
from edgeship.core.runtimes import ActivationMode, Arrays, Engine, Format, Roofline, Runtime, Session, as_numpy
from edgeship.core.weights import Affine, Float, Palette, rebuild
from edgeship.errors import ArtifactError, DataError
from edgeship_zipgraph.model import ZipGraphModel

if TYPE_CHECKING:
    import numpy.typing as npt


class Floats(Form[Float]):
    """Floats, as they are."""

    family: ClassVar[type[Encoding]] = Float
    how: ClassVar[str] = "an array of floats"

    def resident_bits(self, op: WeightOp, encoding: Float, activations: ActivationMode) -> int:
        """Everything is float32 once it is loaded."""
        return 32


class Integers(Form[Affine]):
    """Integers of layers, a byte each."""

    family: ClassVar[type[Encoding]] = Affine
    how: ClassVar[str] = "an array of bytes and one of scales"

    def refusal(self, op: WeightOp, encoding: Affine, activations: ActivationMode) -> str:
        """What was run and compared (tests/plugins)."""
        return "only weights of layers are stored as integers" if op == "other" else ""

    def container_bits(self, op: WeightOp, encoding: Affine) -> int:
        """A byte for integers of any width."""
        return 8

    def scale_bits(self, encoding: Affine) -> int:
        """Scales are float32."""
        return 32

    def resident_bits(self, op: WeightOp, encoding: Affine, activations: ActivationMode) -> int:
        """Everything is float32 once it is loaded."""
        return 32


FORMS = Forms((Floats(), Integers(), Lacks(Palette, "it stores floats and integers with scales")))
FORMAT = Format("zipgraph", "Zip Graph", packages=("numpy",), forms=FORMS)


class ZipGraphRuntime(Runtime):
    """Torch's own operators, in the order of the graph."""

    name: ClassVar[str] = "zipgraph"
    title: ClassVar[str] = "Zip Graph"
    artifact: ClassVar[type[Artifact]] = ZipGraphModel
    format: ClassVar[Format] = FORMAT
    engine: ClassVar[Engine] = Engine(
        packages=("torch",),
        overhead_bytes=200_000_000,
        computes=(),
        # Two cores of a laptop reach about a tenth of their peak in small models, and a run costs a millisecond.
        roofline=Roofline("cpu", 0.1, 1e-3),
    )

    def open(self, artifact: Artifact) -> Session:
        """Load a file. Raises `ArtifactError` when it is damaged."""
        self.versions()
        return _Session(artifact, *_read(artifact.path))

    def warm_imports(self) -> None:
        """Import torch, which is most of what a process with a small model takes."""
        import torch  # noqa: F401

    def read_weights(self, artifact: Artifact) -> dict[str, EncodedTensor]:
        """Every placed weight, from the bytes of the file."""
        self.versions()
        stored = _read(artifact.path)[1]
        missing = [place.weight for place in artifact.placements if place.stored not in stored]
        if missing:
            raise ArtifactError(f"{artifact.path} does not hold {missing[0]}", fix="build it again")
        return {place.weight: stored[place.stored] for place in artifact.placements}

    def refuses(self, op: WeightOp, activations: ActivationMode) -> str:
        """Whatever the encoding."""
        return "" if activations == "float" else "it computes in float32"


class _Session(Session):
    """A loaded graph."""

    def __init__(self, artifact: Artifact, graph: dict[str, Any], stored: dict[str, EncodedTensor]) -> None:
        import torch

        self._artifact, self._graph = artifact, graph
        floats = {name: torch.from_numpy(tensor.dequantize().copy()) for name, tensor in stored.items()}
        self._weights = {node: floats[name] for node, name in graph["weights"].items()}

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run once. Raises `DataError` for an input of another shape, `ArtifactError` when an operator fails."""
        import torch

        signature, values = self._artifact.signature, dict(self._weights)
        for spec, node in zip(signature.inputs, self._graph["inputs"], strict=True):
            found = spec.of(inputs)
            if found is None or tuple(found.shape) != spec.shape:
                raise DataError(f"input {spec.name} is not there, or of another shape", fix=f"give {spec}")
            values[node] = torch.from_numpy(as_numpy(found, spec.numpy_dtype).copy())
        try:
            with torch.no_grad():
                for node in self._graph["nodes"]:
                    given = [_value(item, values) for item in node["args"]]
                    named = {key: _value(item, values) for key, item in node["kwargs"].items()}
                    values[node["name"]] = _operator(node["op"])(*given, **named)
            results = [values[name].numpy() for name in self._graph["outputs"]]
        except (RuntimeError, KeyError, AttributeError, TypeError, ValueError) as error:
            raise ArtifactError(f"{self._artifact.path} does not run: {error}", fix="build it again") from error
        return {
            spec.name: as_numpy(result, spec.numpy_dtype)
            for spec, result in zip(signature.outputs, results, strict=True)
        }


def _read(path: Path) -> tuple[dict[str, Any], dict[str, EncodedTensor]]:
    """The graph of a file, and its weights by name."""
    import numpy as np

    try:
        with zipfile.ZipFile(path) as file:
            graph = json.loads(file.read("graph.json"))
            stored = {}
            for name, record in graph["stored"].items():
                files = {role: file.read(f"{record['place']}/{role}.npy") for role in record["roles"]}
                arrays = {role: np.load(io.BytesIO(data), allow_pickle=False) for role, data in files.items()}
                stored[name] = rebuild(encoding_named(record["encoding"]), arrays)
        if not {"inputs", "nodes", "outputs", "weights"} <= graph.keys():
            raise ValueError("its graph is not whole")
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} holds no graph: {error}", fix="build it again") from error
    return graph, stored


def _operator(name: str) -> Any:
    """An operator of torch by its name, such as ``aten.conv2d.default``."""
    import torch

    if name == "getitem":
        return operator.getitem
    return operator.attrgetter(name)(torch.ops)


def _value(item: Any, values: dict[str, Any]) -> Any:
    """An argument from JSON."""
    import torch

    if isinstance(item, list):
        return [_value(inner, values) for inner in item]
    if not isinstance(item, dict):
        return item
    return values[item["node"]] if "node" in item else getattr(torch, item["dtype"])


RUNTIME = ZipGraphRuntime()
