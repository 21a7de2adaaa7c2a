"""LiteRT through its interpreter on this machine: the same kernels (XNNPACK) that a phone's CPU runs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

from edgeship.core.model import Artifact, Signature, TFLiteModel
from edgeship.core.runtimes import Arrays, Engine, Format, Roofline, Runtime, Session, as_numpy
from edgeship.core.weights import ActivationEncoding, EncodedTensor
from edgeship.errors import ArtifactError, DataError
from edgeship.runtimes.litert.kernels import FORMS

if TYPE_CHECKING:
    import numpy.typing as npt


THREADS = 2
# How the lowering names a tensor of activations: nodes of the graph, bits, and a number when there are several.
_ACTIVATION = re.compile(r"(\S+) \(int(?:8|16)\)(?:#\d+)?")


FORMAT = Format("tflite", "LiteRT", ("ai-edge-litert",), forms=FORMS)


class LiteRTRuntime(Runtime):
    """LiteRT's interpreter with its default delegate (XNNPACK)."""

    name: ClassVar[str] = "tflite"
    title: ClassVar[str] = "LiteRT"
    artifact: ClassVar[type[Artifact]] = TFLiteModel
    format: ClassVar[Format] = FORMAT
    engine: ClassVar[Engine] = Engine(
        extra="tflite",
        unseen="dynamic",
        computes=("int8", "int16", "dynamic"),
        centred_int16=True,
        # Unfitted: matrix kernels of XNNPACK on hot caches, less what threads and phone clocks cost.
        roofline=Roofline("cpu", 0.5, 2.0e-5),
    )

    def open(self, artifact: Artifact) -> Session:
        """Check the file, then load it; kernels run on two threads."""
        self.versions()
        from ai_edge_litert.interpreter import Interpreter

        from edgeship.runtimes.litert.checked import open_checked

        file = open_checked(artifact.path)
        try:
            key = file.root.SignatureDefs(0).SignatureKey().decode()
            interpreter = Interpreter(model_path=str(artifact.path), num_threads=THREADS)
            interpreter.allocate_tensors()
            runner = interpreter.get_signature_runner(key)
            names = {*runner.get_input_details()}, {*runner.get_output_details()}
        except (ValueError, RuntimeError, KeyError, MemoryError, AttributeError) as error:
            raise ArtifactError(f"{artifact.path} does not load in LiteRT: {error}", fix="build again") from None
        signature = artifact.signature
        if names != ({spec.name for spec in signature.inputs}, {spec.name for spec in signature.outputs}):
            raise ArtifactError(f"{artifact.path} has other inputs or outputs than its record", fix="build again")
        return _LiteRTSession(interpreter, runner, signature)

    def read_weights(self, artifact: Artifact) -> dict[str, EncodedTensor]:
        """Every placed weight, read through the format's own schema. Each has torch's own shape."""
        self.versions()
        from edgeship.runtimes.litert.checked import open_checked
        from edgeship.runtimes.litert.stored import read_placed

        file = open_checked(artifact.path)
        return read_placed(file, file.root.SignatureDefs(0).SubgraphIndex(), artifact)

    def read_activations(self, artifact: Artifact) -> dict[str, ActivationEncoding]:
        """The grids of the tensors that are named after graph nodes: ``conv2d+relu (int8)``, ``relu (int8)#1``."""
        self.versions()
        from edgeship.runtimes.litert.checked import open_checked

        file = open_checked(artifact.path)
        graph = file.root.Subgraphs(file.root.SignatureDefs(0).SubgraphIndex())
        found: dict[str, ActivationEncoding] = {}
        for index in range(graph.TensorsLength()):
            tensor = graph.Tensors(index)
            named = _ACTIVATION.fullmatch((tensor.Name() or b"").decode(errors="replace"))
            if named is None:
                continue
            grid = _read_grid(artifact, tensor)
            for node in named.group(1).split("+"):
                if found.setdefault(node, grid) != grid:
                    raise ArtifactError(f"{artifact.path} has two grids for activation {node}", fix="build again")
        return found


class _LiteRTSession(Session):
    def __init__(self, interpreter: Any, runner: Any, signature: Signature) -> None:
        self.interpreter, self.runner, self.signature = interpreter, runner, signature

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Shapes are the signature's."""
        feeds = {}
        for spec in self.signature.inputs:
            found = spec.of(inputs)
            if found is None:
                raise DataError(f"input {spec.name} is missing", fix=f"give {spec}")
            value = as_numpy(found, spec.numpy_dtype)
            if value.shape != spec.shape:
                raise DataError(f"input {spec.name} has shape {list(value.shape)}", fix=f"give {spec}")
            feeds[spec.name] = value
        try:
            outputs = self.runner(**feeds)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise ArtifactError(
                f"LiteRT stopped while running: {error}", fix="check the inputs, or build again"
            ) from None
        return {spec.name: outputs[spec.name].reshape(spec.shape) for spec in self.signature.outputs}

    def close(self) -> None:
        self.runner = self.interpreter = None


def _read_grid(artifact: Artifact, tensor: Any) -> ActivationEncoding:
    from ai_edge_litert import schema_py_generated as schema

    bits = {schema.TensorType.INT8: 8, schema.TensorType.INT16: 16}.get(tensor.Type())
    grid = tensor.Quantization()
    if bits is None or grid is None or grid.ScaleLength() != 1 or grid.ZeroPointLength() != 1:
        raise ArtifactError(f"{artifact.path} holds an activation without a grid", fix="build again")
    return ActivationEncoding(bits, float(grid.Scale(0)), int(grid.ZeroPoint(0)))


RUNTIME = LiteRTRuntime()
