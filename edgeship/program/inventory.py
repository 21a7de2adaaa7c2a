"""Count what a normalised graph holds and costs: weights by use, operators by arithmetic and traffic."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from edgeship.core.inventory import Inventory, OpCost, WeightOp, WeightUse
from edgeship.program.spectra import COMPUTED

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Node


def take_inventory(program: ExportedProgram) -> Inventory:
    """The inventory of a normalised program. Shapes come from the graph's own metadata; nothing is run."""
    names = _weight_names(program)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    weights = tuple(
        _weight_use(names[node.name], node)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
    )
    ops = tuple(_cost(node, names) for node in nodes if _numel(node))
    return Inventory(weights, ops, _peak_live_elements(nodes, names))


def weight_nodes(program: ExportedProgram) -> dict[str, Node]:
    """Weight name -> its placeholder in the graph, for parameters, buffers and constants alike."""
    names = _weight_names(program)
    return {names[node.name]: node for node in program.graph.nodes if node.name in names}


def _weight_names(program: ExportedProgram) -> dict[str, str]:
    signature = program.graph_signature
    return {**signature.inputs_to_parameters, **signature.inputs_to_buffers}


def _weight_use(name: str, node: Node) -> WeightUse:
    value = node.meta["val"]
    shape = tuple(int(size) for size in value.shape)
    # Operator, axis of the channels, and groups, by each reader.
    uses = {_use_of(user, node) for user in node.users}
    readers = tuple(user.name for user in node.users)
    op: WeightOp = "other"
    axis, groups = 0, 1
    # One weight used as both embedding and linear (tied) quantizes per row either way: the linear decides.
    found = {use[0] for use in uses}
    if found and found <= {"linear", "embedding"}:
        op = "linear" if "linear" in found else "embedding"
    elif len(uses) == 1 and not name.startswith(COMPUTED):
        # A basis that the normal form computed is not a trained weight, and keeps its bits.
        op, axis, groups = next(iter(uses))
    # Bits of an element that no encoding touches.
    plain = 0
    if not value.dtype.is_floating_point:
        plain = 8 * value.dtype.itemsize
    return WeightUse(name, op, shape, axis, groups, readers, "embedding" in found, plain)


def _use_of(user: Node, weight: Node) -> tuple[WeightOp, int, int]:
    import torch

    aten = torch.ops.aten
    args = user.args
    second = len(args) > 1 and args[1] is weight
    if user.target == aten.linear.default and second:
        return ("linear", 0, 1)
    if user.target == aten.embedding.default and args[0] is weight:
        return ("embedding", 0, 1)
    if user.target in _recurrent() and weight.meta["val"].dim() > 1 and weight in cast("list[Node]", args[2]):
        return ("recurrent", 0, 1)
    if user.target in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default) and second:
        groups = int(args[6]) if len(args) > 6 else 1  # type: ignore[arg-type]
        shape = weight.meta["val"].shape
        depthwise = groups > 1 and int(shape[1]) == 1
        return ("depthwise_conv" if depthwise else "conv", 0, groups)
    if user.target in (aten.conv_transpose1d.default, aten.conv_transpose2d.input) and second:
        groups = int(args[6]) if len(args) > 6 else 1  # type: ignore[arg-type]
        return ("conv_transpose", 1, groups)
    return ("other", 0, 1)


def _cost(node: Node, names: dict[str, str]) -> OpCost:
    weights = tuple(names[arg.name] for arg in node.all_input_nodes if arg.name in names)
    reads = sum(_numel(arg) for arg in node.all_input_nodes if arg.name not in names)
    return OpCost(node.name, str(node.target).removesuffix(".default"), _macs(node), reads, _numel(node), weights)


def _macs(node: Node) -> int:
    import torch
    from torch import fx

    aten = torch.ops.aten
    target, out = node.target, _numel(node)
    # Not all_input_nodes: that lists a node used twice (x @ x, attention on one tensor) only once.
    shapes = [_shape(arg) for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, fx.Node)]
    if target == aten.linear.default:
        return out * shapes[1][-1]
    if target in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default):
        return out * _product(shapes[1][1:])
    if target in (aten.conv_transpose1d.default, aten.conv_transpose2d.input):
        return _product(shapes[0]) * _product(shapes[1][1:])
    if target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        return out * shapes[0][-1]
    if target == aten.addmm.default:
        return out * shapes[1][-1]
    if target == aten.scaled_dot_product_attention.default:
        # queries x keys for the scores, and again for the values: (B, H, T, D) with (B, H, S, D)
        return _product(shapes[0]) * shapes[1][-2] + out * shapes[1][-2]
    if target in _recurrent():
        # Each weight meets each step of each sequence once.
        weights = cast("list[fx.Node]", node.args[2])
        return _product(shapes[0][:-1]) * sum(_product(_shape(item)) for item in weights if len(_shape(item)) > 1)
    return 0


def _recurrent() -> tuple[object, ...]:
    """Layers over sequences: their third argument lists weights [gates * hidden, in] and biases."""
    import torch

    aten = torch.ops.aten
    return (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


def _peak_live_elements(nodes: list[Node], names: dict[str, str]) -> int:
    """The largest sum of live activations when the graph runs in order and views cost nothing."""
    last_use: dict[Node, int] = {}
    for index, node in enumerate(nodes):
        for arg in node.all_input_nodes:
            last_use[arg] = index
    live = peak = 0
    for index, node in enumerate(nodes):
        live += 0 if _is_view(node) else _numel(node)
        peak = max(peak, live)
        for arg in node.all_input_nodes:
            if last_use[arg] == index and arg.op == "call_function" and not _is_view(arg):
                live -= _numel(arg)
    return peak


def _is_view(node: Node) -> bool:
    import torch

    from edgeship.compat.torch import is_view

    if node.target == torch.ops.aten.reshape.default:
        return True
    return is_view(node.target)


def _shape(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, _tensor_type()) else ()


def _numel(node: Node) -> int:
    """Numbers that an operator answers, of all its outputs; 0 where it answers no tensor."""
    value = node.meta.get("val")
    outputs = value if isinstance(value, (tuple, list)) else [value]
    total = 0
    for output in outputs:
        if isinstance(output, _tensor_type()):
            total += _product(tuple(int(size) for size in output.shape))
    return total


def _tensor_type() -> type[torch.Tensor]:
    import torch

    return torch.Tensor


def _product(sizes: tuple[int, ...]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count
