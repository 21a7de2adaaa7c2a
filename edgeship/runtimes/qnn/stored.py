"""Read weights back from the QDQ graph that goes to Hexagon, looked-up tables included."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeship.core.model import OnnxModel, Placement
from edgeship.core.weights import Affine, AffineTensor, EncodedTensor
from edgeship.errors import ArtifactError
from edgeship.runtimes.onnx_weights import read_placed_weights

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx


def read_graph_weights(graph: OnnxModel) -> dict[str, EncodedTensor]:
    """Every placed weight by torch name. Raises `ArtifactError` when one is not in the file, or it is damaged.

    Each has torch's own shape.
    """
    import onnx

    try:
        model = onnx.load(graph.path)
    except Exception as error:  # protobuf's own, of several types
        raise ArtifactError(f"{graph.path} is damaged: {error}", fix="build again") from None
    scaled = {placement.weight: rows for placement in graph.placements if (rows := _rows(model, placement)) is not None}
    others = tuple(placement for placement in graph.placements if placement.weight not in scaled)
    found = {**read_placed_weights(replace(graph, placements=others)), **scaled}
    return {placement.weight: found[placement.weight] for placement in graph.placements}


def _rows(model: onnx.ModelProto, placement: Placement) -> AffineTensor | None:
    """A table gathered as integers, with the row scales that multiply them; None when it is stored in the plain way."""
    import numpy as np
    import onnx

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def array(name: str) -> npt.NDArray[Any]:
        """A constant in its own shape."""
        values: npt.NDArray[Any] = onnx.numpy_helper.to_array(constants[name])
        return values

    for restore in readers.get(placement.stored, []):
        if restore.op_type != "DequantizeLinear" or restore.input[0] != placement.stored:
            continue
        gather = next((node for node in readers.get(restore.output[0], []) if node.op_type == "Gather"), None)
        product = None if gather is None else _first_product(readers, gather.output[0])
        if gather is None or product is None or array(restore.input[1]).size != 1:
            continue
        for side in product.input:
            origin = _gathered_from(makers, side)
            if origin is not None and origin.input[0] != placement.stored:
                values, unit = array(placement.stored), array(restore.input[1])
                multiples = array(origin.input[0]).astype(np.float64) - float(array(origin.input[2]))
                scale = (multiples * float(array(origin.input[1])) * float(unit)).astype(np.float32)
                return AffineTensor(values, scale.reshape(-1, *[1] * (values.ndim - 1)), None, Affine(8))
        raise ArtifactError(f"nothing in the file scales the rows of {placement.stored}", fix="build again")
    return None


def _first_product(readers: dict[str, list[onnx.NodeProto]], name: str) -> onnx.NodeProto | None:
    """The multiplication that reads a value through quantize and restore pairs only."""
    while True:
        following = readers.get(name, [])
        if len(following) != 1:
            return None
        if following[0].op_type == "Mul":
            return following[0]
        if following[0].op_type not in ("QuantizeLinear", "DequantizeLinear"):
            return None
        name = following[0].output[0]


def _gathered_from(makers: dict[str, onnx.NodeProto], name: str) -> onnx.NodeProto | None:
    """The DequantizeLinear of a table whose gathered rows reach ``name`` through pairs only."""
    while name in makers:
        node = makers[name]
        if node.op_type == "Gather":
            return makers.get(node.input[0])
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            return None
        name = node.input[0]
    return None
