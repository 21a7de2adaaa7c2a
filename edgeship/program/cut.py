"""A program that ends at other values than its own outputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeship.core.model import TensorSpec
from edgeship.errors import LoweringError

if TYPE_CHECKING:
    from torch.fx import Node

    from edgeship.program.program import TorchProgram


def cut_at(program: TorchProgram, names: Sequence[str]) -> TorchProgram:
    """The same program with the values of some of its nodes as outputs, named as the nodes.

    What only fed the old outputs is left out; weights, encodings and grids stay as they are.

    Args:
        names: of graph nodes that make one tensor each, in any order.

    Raises:
        LoweringError: there is no such node, or it does not make a tensor.
    """
    import torch
    from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument

    from edgeship.compat.torch import replaced, structure_of
    from edgeship.program.export import dtype_of
    from edgeship.program.inventory import take_inventory

    module = copy.deepcopy(program.exported.graph_module)
    nodes: dict[str, Node] = {node.name: node for node in module.graph.nodes}
    for name in names:
        if not isinstance(nodes[name].meta.get("val") if name in nodes else None, torch.Tensor):
            raise LoweringError(f"{name} is not a value of the program", fix="name a node that makes a tensor")
    chosen = tuple(nodes[name] for name in names)
    next(node for node in module.graph.nodes if node.op == "output").args = (chosen,)
    module.graph.eliminate_dead_code()
    module.recompile()
    signature = copy.deepcopy(program.exported.graph_signature)
    signature.output_specs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=name), None) for name in names]
    calls = copy.deepcopy(program.exported.module_call_graph)
    root = calls[0].signature
    if root is not None:
        root.out_spec = structure_of(tuple(0 for _ in names))
        root.outputs = [TensorArgument(name=name) for name in names]
    exported = replaced(program.exported, graph_module=module, graph_signature=signature, module_call_graph=calls)
    outputs = tuple(
        TensorSpec(name, dtype_of(node.meta["val"]), tuple(node.meta["val"].shape))
        for name, node in zip(names, chosen, strict=True)
    )
    kept = {node.name for node in module.graph.nodes}
    record = replace(
        program.record,
        signature=replace(program.record.signature, outputs=outputs),
        inventory=take_inventory(exported),
        activations={name: grid for name, grid in program.record.activations.items() if name in kept},
    )
    return replace(program, held=exported, record=record)
