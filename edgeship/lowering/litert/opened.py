"""Open a torch program: its large weights become inputs of the graph, to be stored in the artifact afterwards.

The converter never sees the values, so it cannot fold, merge or round them, and needs memory for none of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeship.errors import LoweringError
from edgeship.program.inventory import weight_nodes

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Node

    from edgeship.program.program import TorchProgram


@dataclass(frozen=True)
class OpenedProgram:
    """A module that takes the signature's inputs and then ``weights``, in this order.

    Args:
        module: an ``fx.GraphModule``. examples: one tensor an input; weights are stride-0, one number each.
        weights: torch names of the weights that became inputs.
    """

    module: torch.fx.GraphModule
    examples: tuple[torch.Tensor, ...]
    weights: tuple[str, ...]


def stored_weights(program: TorchProgram) -> list[str]:
    """Weights that are stored after conversion: all that compression decided, and all that layers multiply with."""
    aliases = program.record.aliases
    large = [weight.name for weight in program.record.inventory.weights if weight.op != "other"]
    return list(dict.fromkeys([*program.encoded, *(aliases.get(name, name) for name in large)]))


def constant_nodes(exported: ExportedProgram) -> dict[str, Node]:
    """Every weight, buffer and constant of a graph by name, those included that tracing made of numbers in the code."""
    lifted = exported.graph_signature.inputs_to_lifted_tensor_constants
    named = {lifted[node.name]: node for node in exported.graph.nodes if node.name in lifted}
    return {**weight_nodes(exported), **named}


def open_weights(program: TorchProgram, names: Iterable[str]) -> OpenedProgram:
    """``program`` with the named weights as inputs; the others are constants in float32.

    Raises:
        LoweringError: a named weight is not in the graph.
    """
    import torch
    from torch.fx import Graph, GraphModule

    wanted = list(dict.fromkeys(names))
    aliases = program.record.aliases
    by_node = {node: name for name, node in constant_nodes(program.exported).items()}
    graph, holder = Graph(), torch.nn.Module()
    mapping: dict[torch.fx.Node, torch.fx.Node] = {}
    placeholders = [node for node in program.exported.graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        if node not in by_node:
            mapping[node] = graph.placeholder(node.name)
            mapping[node].meta = dict(node.meta)
    opened: dict[str, torch.fx.Node] = {}
    for node in placeholders:
        name = by_node.get(node)
        if name is None:
            continue
        tied = aliases.get(name, name)
        if tied in wanted:
            if tied not in opened:
                opened[tied] = graph.placeholder(node.name)
            mapping[node] = opened[tied]
    missing = [name for name in wanted if name not in opened]
    if missing:
        raise LoweringError(
            f"weight {missing[0]} is not used by the graph", fix="leave it out of what compression decides"
        )
    for node in program.exported.graph.nodes:
        if node in mapping or (node in by_node and not node.users):
            continue
        if node.op == "placeholder":
            # A copy: the converter clamps infinities in place.
            holder.register_buffer(node.name, program.weight(by_node[node]).detach().clone())
            mapping[node] = graph.get_attr(node.name)
        elif node.op == "output":
            graph.output(tuple(mapping[value] for value in node.args[0]))
        else:
            mapping[node] = graph.node_copy(node, lambda value: mapping[value])
        mapping.get(node, node).meta = dict(node.meta)
    metas = {aliases.get(name, name): node.meta["val"] for node, name in by_node.items()}
    examples: list[Any] = [torch.as_tensor(value) for value in program.example_inputs()]
    examples += [torch.zeros((), dtype=metas[name].dtype).expand(metas[name].shape) for name in opened]
    module = GraphModule(holder, graph)
    return OpenedProgram(module.eval(), tuple(examples), tuple(opened))
