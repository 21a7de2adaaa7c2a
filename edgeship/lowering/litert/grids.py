"""Which tensors of a converted model carry a decided activation grid, by the name of the graph node.

The converter keeps no names. So the graph is converted with a scale of its own for every node (a *mark*), which no
folding can confuse with another; the decided scales replace the marks afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeship.core.weights import ActivationEncoding
from edgeship.errors import LoweringError

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema
    from torch.fx import GraphModule

    from edgeship.program.program import TorchProgram

# Marks are 1 + n * MARK: different float32 numbers for a million nodes.
MARK = 2.0**-20


def with_marked_pairs(program: TorchProgram) -> TorchProgram:
    """``program`` with a quantize/dequantize pair after each decided node, at its mark."""
    from edgeship.program.activations import insert_pairs

    marks = {
        name: replace(encoding, scale=1 + number * MARK)
        for number, (name, encoding) in enumerate(program.activations.items(), 1)
    }
    exported = insert_pairs(program.exported, marks)
    _one_reader_each(exported.graph_module)
    return replace(program, held=exported)


def _one_reader_each(module: GraphModule) -> None:
    """Repeat each dequantize for each of its readers.

    litert-torch 0.9's layout pass forgets the shape of one that it moves, and stops at its second reader.
    """
    from edgeship.compat.torch import pair_operators

    for node in list(module.graph.nodes):
        if node.target != pair_operators().dequantize_per_tensor.default:
            continue
        for user in list(node.users)[1:]:
            if user.op == "output":
                continue
            with module.graph.inserting_after(node):
                again = module.graph.node_copy(node)
            user.replace_input_with(node, again)
    module.recompile()


def unmark(
    model: schema.ModelT, subgraph: schema.SubGraphT, activations: Mapping[str, ActivationEncoding]
) -> dict[int, str]:
    """Put the decided scales where the marks were. Returns tensor number -> node name.

    Raises:
        LoweringError: a decided node has no tensor, or its integers were folded into a constant at the mark.
    """
    names = list(activations)
    found: dict[int, str] = {}
    for index, tensor in enumerate(subgraph.tensors):
        scale = None if tensor.quantization is None else tensor.quantization.scale
        if scale is None or len(scale) != 1:
            continue
        number = round((float(scale[0]) - 1) / MARK)
        if not 1 <= number <= len(names):
            continue
        if model.buffers[tensor.buffer].data is not None and len(model.buffers[tensor.buffer].data):
            raise LoweringError(
                f"the LiteRT converter folded activation {names[number - 1]}", fix="report this as a bug"
            )
        found[index] = names[number - 1]
        tensor.quantization = quantization(activations[names[number - 1]])
    missing = activations.keys() - found.values()
    if missing:
        raise LoweringError(
            f"activation {min(missing, key=names.index)} was lost by the LiteRT converter", fix="report this as a bug"
        )
    return found


def quantization(encoding: ActivationEncoding) -> schema.QuantizationParametersT:
    """A grid as the schema has it."""
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    return schema.QuantizationParametersT(
        scale=np.array([encoding.scale], np.float32), zeroPoint=np.array([encoding.zero_point], np.int64)
    )


def tensor_name(nodes: Iterable[str], bits: int) -> str:
    """How a tensor that holds these nodes' integers is called: ``conv2d+relu (int8)``."""
    return f"{'+'.join(dict.fromkeys(nodes))} (int{bits})"


def joined_name(one: bytes, other: bytes) -> bytes:
    """The name of integers on one grid that stand for the nodes of two tensors, either of which may name none."""
    marks = [name.rpartition(b" (int") for name in (one, other)]
    if not marks[0][1] or not marks[1][1]:
        return other if marks[1][1] else one
    nodes = dict.fromkeys([*marks[0][0].split(b"+"), *marks[1][0].split(b"+")])
    return b"+".join(nodes) + b" (int" + marks[0][2]
