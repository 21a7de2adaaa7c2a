"""LiteRT through its interpreter on this machine: the same kernels (XNNPACK) that a phone's CPU runs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

from edgeship.core.model import Artifact, Placement, Signature, TFLiteModel
from edgeship.core.runtimes import ActivationMode, Arrays, Runtime, Session, as_numpy
from edgeship.core.weights import ActivationEncoding, Affine, AffineTensor, EncodedTensor, Encoding, FloatTensor
from edgeship.errors import ArtifactError, DataError, EncodingError
from edgeship.runtimes.litert.kernels import container_bits, refusal, resident_bits

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeship.core.inventory import WeightOp
    from edgeship.runtimes.litert.checked import CheckedFile

THREADS = 2
# How the lowering names a tensor of activations: nodes of the graph, bits, and a number when there are several.
_ACTIVATION = re.compile(r"(\S+) \(int(?:8|16)\)(?:#\d+)?")


class LiteRTRuntime(Runtime):
    """LiteRT's interpreter with its default delegate (XNNPACK)."""

    name: ClassVar[str] = "tflite"
    title: ClassVar[str] = "LiteRT"
    artifact: ClassVar[type[Artifact]] = TFLiteModel
    packages: ClassVar[tuple[str, ...]] = ("ai-edge-litert",)
    extra: ClassVar[str] = "tflite"
    timed: ClassVar[bool] = True

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
        """Every placed weight, read through the format's own schema."""
        self.versions()
        from edgeship.runtimes.litert.checked import open_checked

        file = open_checked(artifact.path)
        graph = file.root.Subgraphs(file.root.SignatureDefs(0).SubgraphIndex())
        by_name = {}
        for index in range(graph.TensorsLength()):
            tensor = graph.Tensors(index)
            by_name[(tensor.Name() or b"").decode(errors="replace")] = tensor
        found: dict[str, EncodedTensor] = {}
        for placement in artifact.placements:
            if placement.stored not in by_name:
                raise ArtifactError(f"{artifact.path} does not hold weight {placement.weight}", fix="build again")
            try:
                weight = _read_weight(file, graph, by_name[placement.stored], placement)
            except (ValueError, IndexError, KeyError, AttributeError, EncodingError) as error:
                raise ArtifactError(
                    f"weight {placement.weight} in {artifact.path}: {error}", fix="build again"
                ) from None
            found[placement.weight] = weight
        return found

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

    def container_bits(self, op: WeightOp, encoding: Encoding) -> int:
        """Four bits for 3-bit integers."""
        return container_bits(encoding)

    def resident_bits(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> int:
        """See `edgeship.runtimes.litert.kernels`."""
        return resident_bits(op, encoding, activations)

    def scale_bits(self, encoding: Encoding) -> int:
        """Scales of blocks are float16 in the file, others float32."""
        return 16 if isinstance(encoding, Affine) and encoding.granularity == "group" else 32

    def holds(self, op: WeightOp, encoding: Encoding, activations: ActivationMode) -> str:
        """See `edgeship.runtimes.litert.kernels`."""
        return refusal(op, encoding, activations)


class _LiteRTSession(Session):
    def __init__(self, interpreter: Any, runner: Any, signature: Signature) -> None:
        self.interpreter, self.runner, self.signature = interpreter, runner, signature

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        feeds = {}
        for spec in self.signature.inputs:
            if spec.name not in inputs:
                raise DataError(f"input {spec.name} is missing", fix=f"give {spec}")
            value = as_numpy(inputs[spec.name], spec.numpy_dtype)
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


def _read_weight(file: CheckedFile, graph: Any, tensor: Any, placement: Placement) -> EncodedTensor:
    """One tensor in the torch weight's own layout."""
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    types = schema.TensorType
    shape = tuple(int(size) for size in tensor.ShapeAsNumpy())
    if placement.shape is not None and shape != placement.shape:
        raise ValueError(f"stored shape {shape}, recorded {placement.shape}")
    data, kind = file.data(tensor.Buffer()), tensor.Type()
    if kind in (types.FLOAT32, types.FLOAT16):
        values = data.view(np.float32 if kind == types.FLOAT32 else np.float16).reshape(shape)
        return FloatTensor(_own_layout(values, placement))
    bits = {types.INT8: 8, types.INT4: 4, types.INT2: 2}[kind]
    integers = _unpacked(data, bits, int(np.prod(shape))).reshape(shape)
    scale, encoding = _scales(file, graph, tensor, shape, bits)
    return AffineTensor(_own_layout(integers, placement), _own_layout(scale, placement), None, encoding)


def _scales(
    file: CheckedFile, graph: Any, tensor: Any, shape: tuple[int, ...], bits: int
) -> tuple[npt.NDArray[Any], Affine]:
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    quantization = tensor.Quantization()
    if quantization is None:
        raise ValueError("it has integers without scales")
    if quantization.DetailsType() == schema.QuantizationDetails.BlockwiseQuantization:
        block = schema.BlockwiseQuantization()
        table = quantization.Details()
        block.Init(table.Bytes, table.Pos)
        scales = graph.Tensors(block.Scales())
        values = file.data(scales.Buffer()).view(np.float16).astype(np.float32)
        values = values.reshape(tuple(int(size) for size in scales.ShapeAsNumpy()))
        return values, Affine(bits, granularity="group", group_size=int(block.BlockSize()))
    if quantization.ZeroPointLength() and bool(np.any(quantization.ZeroPointAsNumpy())):
        raise ValueError("it has zero points, which nothing here stores")
    values = np.asarray(quantization.ScaleAsNumpy(), np.float32)
    axis = quantization.QuantizedDimension()
    spread = [1] * len(shape)
    if values.size > 1:
        spread[axis] = values.size
    return values.reshape(spread), Affine(bits, granularity="channel" if values.size > 1 else "tensor")


def _unpacked(data: npt.NDArray[Any], bits: int, count: int) -> npt.NDArray[Any]:
    """Signed integers from bytes that hold 8 / bits of them, the first in the lowest bits."""
    import numpy as np

    if bits == 8:
        return data.view(np.int8)
    each = 8 // bits
    parts = np.stack([(data >> (bits * position)) & (2**bits - 1) for position in range(each)], axis=-1)
    values = parts.reshape(-1)[:count].astype(np.int8)
    return np.where(values >= 2 ** (bits - 1), values - 2**bits, values).astype(np.int8)


def _own_layout(stored: npt.NDArray[Any], placement: Placement) -> npt.NDArray[Any]:
    """Undo the placement: ``stored`` may have 1 along an axis where the weight has more (scales)."""
    import numpy as np

    order = placement.permutation
    if order is None:
        return np.ascontiguousarray(stored)
    recorded = placement.shape or stored.shape
    long = [size for size, whole in zip(stored.shape, recorded, strict=True) if whole > 1]
    # Axes longer than 1 kept the order of the permutation; the others stand at its end.
    own = stored.reshape(long + [1] * (len(order) - len(long)))
    return np.ascontiguousarray(own.transpose(np.argsort(order)))


RUNTIME = LiteRTRuntime()
