"""Name a converted model's inputs, outputs and signature as the torch program does, and strip what is not the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeship.core.model import Dtype, Signature, TensorSpec
from edgeship.errors import LoweringError
from edgeship.lowering.litert.convert import SIGNATURE_KEY
from edgeship.lowering.litert.flatbuffer import signature_of

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

# What LiteRT takes and gives for each dtype of the torch program.
_ON_DEVICE: dict[Dtype, Dtype] = {"i64": "i32"}


def on_device(signature: Signature) -> Signature:
    """The signature of the artifact: the same names and shapes, token ids in int32."""

    def move(spec: TensorSpec) -> TensorSpec:
        return spec.with_dtype(_ON_DEVICE.get(spec.dtype, spec.dtype))

    return Signature(tuple(map(move, signature.inputs)), tuple(map(move, signature.outputs)))


def name_interface(model: schema.ModelT, signature: Signature, weights: int, key: str = SIGNATURE_KEY) -> list[int]:
    """Name inputs and outputs of signature ``key``; take the ``weights`` inputs that follow them out of it.

    Returns:
        The tensor numbers of those weight inputs, in order.

    Raises:
        LoweringError: the converter dropped or added an input or output.
    """
    found = signature_of(model, key)
    subgraph = model.subgraphs[found.subgraphIndex]
    inputs = {entry.name.decode(): entry for entry in found.inputs}
    outputs = {entry.name.decode(): entry for entry in found.outputs}
    wanted_inputs = [f"args_{number}" for number in range(len(signature.inputs) + weights)]
    wanted_outputs = [f"output_{number}" for number in range(len(signature.outputs))]
    if inputs.keys() != set(wanted_inputs) or outputs.keys() != set(wanted_outputs):
        raise LoweringError("the LiteRT converter changed the model's inputs or outputs", fix="report this as a bug")
    taken = [inputs[name] for name in wanted_inputs]
    found.inputs = taken[: len(signature.inputs)]
    found.outputs = [outputs[name] for name in wanted_outputs]
    specs = (*signature.inputs, *signature.outputs)
    for spec, entry in zip(specs, (*found.inputs, *found.outputs), strict=True):
        entry.name = spec.name.encode()
        subgraph.tensors[entry.tensorIndex].name = spec.name.encode()
    subgraph.name = key.encode()
    weight_inputs = [int(entry.tensorIndex) for entry in taken[len(signature.inputs) :]]
    subgraph.inputs = [entry.tensorIndex for entry in taken]
    subgraph.outputs = [entry.tensorIndex for entry in found.outputs]
    # The converter's notes describe the float graph with open weights; they would be wrong from here on.
    model.metadata, model.description = [], b"edgeship"
    return weight_inputs
