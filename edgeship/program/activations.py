"""Static activation quantization on an exported graph: quantize/dequantize pairs placed where they were decided."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeship.core.weights import ActivationEncoding
from edgeship.errors import LoweringError

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def insert_pairs(program: ExportedProgram, activations: Mapping[str, ActivationEncoding]) -> ExportedProgram:
    """A copy of ``program`` where each named node is followed by quantize and dequantize, and its users read that.

    Graph outputs read the dequantized value too. Raises `LoweringError` when a name is not in the graph.
    """
    import torch
    import torch.ao.quantization.fx._decomposed

    program = copy.copy(program)
    module = copy.deepcopy(program.graph_module)
    program._graph_module = module
    graph = module.graph
    nodes = {node.name: node for node in graph.nodes}
    ops = torch.ops.quantized_decomposed
    renamed: dict[str, str] = {}
    for name, encoding in activations.items():
        if name not in nodes:
            raise LoweringError(f"activation {name} is not in the graph", fix="build again without the cache")
        node = nodes[name]
        dtype = torch.int8 if encoding.bits == 8 else torch.int16
        numbers = (encoding.scale, encoding.zero_point, encoding.low, encoding.high, dtype)
        last_placeholder = [n for n in graph.nodes if n.op == "placeholder"][-1]
        with graph.inserting_after(last_placeholder if node.op == "placeholder" else node):
            quantize = graph.call_function(ops.quantize_per_tensor.default, (node, *numbers))
        with graph.inserting_after(quantize):
            restore = graph.call_function(ops.dequantize_per_tensor.default, (quantize, *numbers))
        value = node.meta["val"]
        quantize.meta["val"] = value.to(dtype)
        restore.meta["val"] = value
        node.replace_all_uses_with(restore, delete_user_cb=lambda user, keep=quantize: user is not keep)
        renamed[name] = restore.name
    module.recompile()
    signature = copy.deepcopy(program.graph_signature)
    for spec in signature.output_specs:
        if getattr(spec.arg, "name", None) in renamed:
            spec.arg.name = renamed[spec.arg.name]
    program._graph_signature = signature
    return program
