"""Static activation quantization on an exported graph: quantize/dequantize pairs, placed where they were decided and
taken out again where a file came with its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeship.core.weights import ActivationEncoding
from edgeship.errors import LoweringError

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Graph, Node


def insert_pairs(program: ExportedProgram, activations: Mapping[str, ActivationEncoding]) -> ExportedProgram:
    """A copy of ``program`` where each named node is followed by quantize and dequantize, and its users read that.

    Graph outputs read the dequantized value too. Raises `LoweringError` when a name is not in the graph.
    """
    import torch

    from edgeship.compat.torch import pair_operators, replaced

    module = copy.deepcopy(program.graph_module)
    graph = module.graph
    nodes = {node.name: node for node in graph.nodes}
    ops = pair_operators()
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
    return replaced(program, graph_module=module, graph_signature=signature)


def take_pairs(program: ExportedProgram) -> dict[str, ActivationEncoding]:
    """Remove every quantize/dequantize pair from ``program``, in place; the grid of each value by its node's name.

    `insert_pairs` of the result makes the same numbers. A value that something reads as it was before its pair, or in
    a second grid, gets a reshape of its own to carry the pair.
    """
    from edgeship.compat.torch import pair_operators

    ops = pair_operators()
    graph = program.graph_module.graph
    grids: dict[Node, ActivationEncoding] = {}
    for quantize in [node for node in graph.nodes if node.target == ops.quantize_per_tensor.default]:
        pairs = list(quantize.users)
        if any(
            user.target != ops.dequantize_per_tensor.default or user.args[1:] != quantize.args[1:] for user in pairs
        ):
            raise LoweringError(f"{quantize.name} is no pair", fix="report this as a bug")
        source, scale, zero, low, high = quantize.args[:5]
        grid = ActivationEncoding(8 if high - low == 255 else 16, float(scale), int(zero))
        if source in grids and grids[source] == grid:
            holder = source
        elif source in grids or any(user.args[1:] != quantize.args[1:] for user in source.users):
            holder = _carrier(graph, source, quantize)
        else:
            holder = source
        grids[holder] = grid
        for user in pairs:
            user.replace_all_uses_with(holder)
            _rename_outputs(program, user.name, holder.name)
            graph.erase_node(user)
        graph.erase_node(quantize)
    program.graph_module.recompile()
    return {node.name: grid for node, grid in grids.items()}


def _carrier(graph: Graph, source: Node, before: Node) -> Node:
    """The same value as a node of its own."""
    import torch

    value = source.meta["val"]
    with graph.inserting_before(before):
        node = graph.call_function(torch.ops.aten.reshape.default, (source, list(value.shape)))
    node.meta.update({**source.meta, "val": value})
    return node


def _rename_outputs(program: ExportedProgram, old: str, new: str) -> None:
    for spec in program.graph_signature.output_specs:
        if getattr(spec.arg, "name", None) == old:
            spec.arg.name = new


# What moves or selects numbers and computes none: one grid serves both its ends.
_MOVING = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "unsqueeze", "squeeze", "expand", "flatten", "slice",
    "select", "index_select", "max_pool1d", "max_pool2d", "pixel_shuffle", "pixel_unshuffle", "relu",
}  # fmt: skip
_CLIPS = {"relu", "relu6", "hardtanh", "clamp"}


def spread_grids(
    program: ExportedProgram, grids: Mapping[str, ActivationEncoding], *, clips: bool = True
) -> dict[str, ActivationEncoding]:
    """``grids`` and those that follow from them without changing a number: runtimes want both ends of what moves
    integers on one grid, and a clip's input on the grid of the clip.

    Forward a grid follows what moves its values; backward it goes to a value that nothing else reads.

    Args:
        clips: the runtime clips inside the layer before. Where it does not, only a ReLU whose grid begins at 0 counts,
            which the grid itself does; any other is quicker behind a layer in float, as the source has it.
    """
    found = dict(grids)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    for node in nodes:
        sources = _values(node)
        if node.name in found or not sources or _operator(node) not in _MOVING | {"cat", "getitem", "split"}:
            continue
        of_sources = {found.get(source.name) for source in sources}
        (grid, *others) = of_sources
        # What only leaves the graph needs no grid of its own.
        if grid is not None and not others and _is_float(node) and any(user.op != "output" for user in node.users):
            found[node.name] = grid
    for node in reversed(nodes):
        # What moves on to another grid is rounded there, once.
        moved = [user for user in node.users if _operator(user) in _MOVING and user.name in found]
        if node.name not in grids and any(found[user.name] != found.get(node.name) for user in moved):
            found.pop(node.name, None)
    for node in reversed(nodes):
        sources = _values(node)
        if node.name not in found or len(sources) != 1 or _operator(node) not in _MOVING | _CLIPS:
            continue
        (source,) = sources
        grid = found[node.name]
        if not clips and _operator(node) in _CLIPS and (_operator(node) != "relu" or grid.zero_point != grid.low):
            continue
        private = source.op == "call_function" and len(source.users) == 1 and _is_float(source)
        if private and source.name not in found:
            found[source.name] = found[node.name]
    order = [node.name for node in program.graph.nodes]
    return {name: found[name] for name in order if name in found}


def _operator(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0].rstrip("_")


def _values(node: Node) -> list[Node]:
    """The float arguments, through the tuple of a split."""
    sources = [arg for arg in node.all_input_nodes if _is_float(arg) or isinstance(arg.meta.get("val"), (list, tuple))]
    return [
        _values(arg)[0] if isinstance(arg.meta.get("val"), (list, tuple)) and _values(arg) else arg for arg in sources
    ]


def _is_float(node: Node) -> bool:
    import torch

    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
