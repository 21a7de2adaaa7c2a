"""Read weights out of a checked LiteRT file, through the format's own schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeship.core.model import Artifact, Placement
from edgeship.core.weights import Affine, AffineTensor, EncodedTensor, FloatTensor
from edgeship.errors import ArtifactError, EncodingError

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeship.runtimes.litert.checked import CheckedFile


def read_placed(file: CheckedFile, number: int, artifact: Artifact) -> dict[str, EncodedTensor]:
    """Every placed weight, from the graph of that number. Each has torch's own shape."""
    graph = file.root.Subgraphs(number)
    by_name = tensors_by_name(graph)
    found: dict[str, EncodedTensor] = {}
    for placement in artifact.placements:
        if placement.stored not in by_name:
            raise ArtifactError(f"{artifact.path} does not hold weight {placement.weight}", fix="build again")
        try:
            weight = _read_weight(file, graph, by_name[placement.stored], placement)
        except (ValueError, IndexError, KeyError, AttributeError, EncodingError) as error:
            raise ArtifactError(f"weight {placement.weight} in {artifact.path}: {error}", fix="build again") from None
        found[placement.weight] = weight
    return found


def refuse_other_weights(file: CheckedFile, first: int, other: int, artifact: Artifact) -> None:
    """Raise `ArtifactError` when two graphs hold different constants under the name of one placed weight."""
    import numpy as np

    mine, theirs = tensors_by_name(file.root.Subgraphs(first)), tensors_by_name(file.root.Subgraphs(other))
    for stored in {placement.stored for placement in artifact.placements} & mine.keys() & theirs.keys():
        one, two = mine[stored], theirs[stored]
        grids = [tensor.Quantization() for tensor in (one, two)]
        scales = [np.empty(0) if grid is None else np.asarray(grid.ScaleAsNumpy()) for grid in grids]
        same = one.Buffer() == two.Buffer() and one.Type() == two.Type()
        if not same or not np.array_equal(scales[0], scales[1]):
            raise ArtifactError(f"{artifact.path} holds two different {stored}", fix="build again")


def tensors_by_name(graph: Any) -> dict[str, Any]:
    """The tensors of a graph."""
    tensors = [graph.Tensors(index) for index in range(graph.TensorsLength())]
    return {(tensor.Name() or b"").decode(errors="replace"): tensor for tensor in tensors}


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
    """Scales with the rank of the weight, [out, 1, ...] or [out, in / group], and the encoding that they make."""
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
    """Signed integers from bytes that hold 8 / bits of them, the first in the lowest bits. [bytes] -> [count]."""
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
