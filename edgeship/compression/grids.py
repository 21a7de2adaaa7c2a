"""Which nodes of a graph carry an activation grid, and which of them must share one.

Runtimes move, pool, pad and join integers without rescaling them, so both sides must have the same (scale, zero
point): LiteRT's and QNN's kernels require it, and it saves a rounding everywhere. A ReLU's input takes the ReLU's grid:
clipping to that grid *is* the ReLU. Softmax, sigmoid and tanh have fixed ranges (LiteRT's quantization specification).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeship.program.decided import deciding_nodes, is_layer

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from torch.export import ExportedProgram
    from torch.fx import Node

# Operators by the start of their name: aten.<name>.<overload>.
SAME_AS_INPUT = {
    "view", "reshape", "_unsafe_view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "flatten",
    "unflatten", "slice", "select", "narrow", "index", "index_select", "gather", "split", "split_with_sizes", "chunk",
    "unbind", "getitem", "flip", "roll", "repeat", "repeat_interleave", "tile", "pixel_shuffle", "pixel_unshuffle",
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_linear1d", "pad", "constant_pad_nd", "amax", "amin", "max",
    "min", "movedim", "unfold", "as_strided", "diagonal", "channel_shuffle",
}  # fmt: skip
JOINING = {
    "cat", "stack", "where", "masked_fill", "maximum", "minimum", "slice_scatter", "select_scatter", "index_put",
    "copy",
}  # fmt: skip
CLIPPING = {"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min"}
UNIT_RANGE = {"softmax", "_softmax", "sigmoid"}
SIGNED_UNIT_RANGE = {"tanh"}
# Weights and biases are stored by their own rules; these argument positions carry no activation.
WEIGHT_ARGUMENTS = {
    "linear": (1, 2), "conv1d": (1, 2), "conv2d": (1, 2), "conv3d": (1, 2), "convolution": (1, 2),
    "conv_transpose1d": (1, 2), "conv_transpose2d": (1, 2), "conv_transpose3d": (1, 2), "embedding": (0,),
    "layer_norm": (2, 3), "native_layer_norm": (2, 3), "group_norm": (2, 3), "rms_norm": (2,),
    "batch_norm": (1, 2, 3, 4), "instance_norm": (1, 2, 3, 4), "prelu": (1,), "_prelu_kernel": (1,),
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Nodes that share one (scale, zero point).

    Args:
        nodes: names, in graph order. watched: those whose values decide the range.
        fixed: ``unit`` for 0..1, ``signed`` for -1..1, else empty.
        clip: the bounds of the ReLUs and clamps among the nodes; infinite where there is none.
    """

    nodes: tuple[str, ...]
    watched: tuple[str, ...]
    fixed: str = ""
    clip: tuple[float, float] = (-math.inf, math.inf)


def operator_name(node: Node) -> str:
    """``conv2d`` for ``aten.conv2d.default``; ``getitem`` for operator.getitem; empty for placeholders."""
    if node.op != "call_function":
        return ""
    name = str(getattr(node.target, "__name__", node.target))
    return name.split(".")[0]


def activation_nodes(program: ExportedProgram) -> list[Node]:
    """Nodes with a float value that depends on the inputs, and float constants that meet such values in arithmetic."""
    constants = set(program.graph_signature.inputs_to_parameters) | set(program.graph_signature.inputs_to_buffers)
    moving: set[Node] = set()
    # What the inputs reach, in one sweep: nodes come after what they read.
    for node in program.graph.nodes:
        is_input = node.op == "placeholder" and node.name not in constants
        if is_input or (node.op == "call_function" and any(arg in moving for arg in node.all_input_nodes)):
            moving.add(node)
    # An input that nothing reads keeps no grid in any file.
    wanted = {node for node in moving if _is_float(node) and node.users}
    for node in program.graph.nodes:
        if node in moving and _is_float(node):
            wanted.update(arg for arg in activation_arguments(node) if arg not in moving and _is_float(arg))
        if node.op == "output":
            wanted.update(arg for arg in node.all_input_nodes if _is_float(arg))
    return [node for node in program.graph.nodes if node in wanted]


def activation_arguments(node: Node) -> list[Node]:
    """The nodes that ``node`` reads as activations: all but its weights and biases."""
    skipped = WEIGHT_ARGUMENTS.get(operator_name(node), ())
    # By identity: arguments are numbers and lists too, which need not be hashable.
    weights = {id(node.args[i]) for i in skipped if i < len(node.args)}
    return [arg for arg in node.all_input_nodes if id(arg) not in weights]


def shared_grids(program: ExportedProgram, floats: Collection[str] = ()) -> list[Grid]:
    """Every activation of the graph in exactly one grid, in graph order, but for ``floats``, which have none, and for
    what a suppression decides by."""
    # What a layer reads keeps its grid: its integer weights want one.
    deciding = {node for node in deciding_nodes(program.graph) if not any(map(is_layer, node.users))}
    nodes = [node for node in activation_nodes(program) if node.name not in floats and node not in deciding]
    known = set(nodes)
    groups = _Groups(nodes)
    for node in nodes:
        if keeps_grid(node):
            groups.join([node, *carriers(node)[:1]])
    fixed: dict[Node, str] = {}
    for node in nodes:
        if kind := _fixed_range(node):
            fixed[groups.find(node)] = kind
    for node in nodes:
        if operator_name(node) in JOINING and groups.find(node) not in fixed:
            loose = [arg for arg in carriers(node) if arg in known and groups.find(arg) not in fixed]
            groups.join([node, *loose])
    # A clip and what only it reads: the clip's own range serves both.
    clipped: set[Node] = set()
    for node in nodes:
        if operator_name(node) not in CLIPPING or groups.find(node) in fixed:
            continue
        for source in carriers(node)[:1]:
            if source in known and _is_private(source, groups):
                groups.join([node, source])
                clipped.add(source)
    # Nodes by the root of their group, in graph order.
    members: dict[Node, list[Node]] = {}
    for node in nodes:
        members.setdefault(groups.find(node), []).append(node)
    # Joining may have given a group another root.
    fixed = {groups.find(root): kind for root, kind in fixed.items()}
    grids: list[Grid] = []
    for root, group in members.items():
        names = tuple(node.name for node in group)
        watched = tuple(node.name for node in group if node not in clipped)
        grids.append(Grid(names, watched, fixed.get(root, ""), _bounds(group)))
    return grids


def clip_bounds(node: Node) -> tuple[float, float]:
    """What a ReLU or clamp lets through; infinite where ``node`` is none, or has no bound there."""
    name = operator_name(node).removesuffix("_")
    given = dict(zip(("low", "high"), node.args[1:3], strict=False))
    low = given.get("low", node.kwargs.get("min", node.kwargs.get("min_val")))
    high = given.get("high", node.kwargs.get("max", node.kwargs.get("max_val")))
    if name == "relu":
        return 0.0, math.inf
    if name == "relu6":
        return 0.0, 6.0
    if name == "hardtanh":
        return _number(low, -1.0 if low is None else -math.inf), _number(high, 1.0 if high is None else math.inf)
    if name in ("clamp", "clamp_min"):
        return _number(low, -math.inf), _number(high, math.inf)
    return -math.inf, math.inf


def _number(value: object, other: float) -> float:
    """``value`` where it is a number, and not a tensor or nothing; else ``other``."""
    return value if isinstance(value, (int, float)) else other


def _bounds(nodes: Iterable[Node]) -> tuple[float, float]:
    """The narrowest of the clips among ``nodes``."""
    lows, highs = zip(*map(clip_bounds, nodes), strict=True)
    return max(lows), min(highs)


def keeps_grid(node: Node) -> bool:
    """Whether an operator only moves, picks or averages numbers of its first input."""
    name = operator_name(node)
    # A pool over everything is a mean: its values are far narrower than its input's, so it gets its own grid.
    return name in SAME_AS_INPUT or (name == "adaptive_avg_pool2d" and node.meta["val"].shape[-2:].numel() > 1)


def _fixed_range(node: Node) -> str:
    """``Grid.fixed`` of an operator whose range is known before it runs."""
    name = operator_name(node)
    if name in UNIT_RANGE:
        return "unit"
    return "signed" if name in SIGNED_UNIT_RANGE else ""


def carriers(node: Node) -> list[Node]:
    """Float arguments, looking through a tuple (``split`` -> ``getitem``)."""
    found = []
    for arg in activation_arguments(node):
        if isinstance(arg.meta.get("val"), (tuple, list)):
            found += carriers(arg)[:1]
        elif _is_float(arg):
            found.append(arg)
    return found


def _is_private(source: Node, groups: _Groups) -> bool:
    """Whether only the clip reads ``source``, and nothing else shares its grid."""
    return source.op == "call_function" and len(source.users) == 1 and groups.size(source) == 1


def _is_float(node: Node) -> bool:
    import torch

    value: Any = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


class _Groups:
    """Union-find over nodes; the root is the first in graph order."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._parent = {node: node for node in nodes}
        self._order = {node: index for index, node in enumerate(self._parent)}
        self._size = dict.fromkeys(self._parent, 1)

    def find(self, node: Node) -> Node:
        while self._parent[node] is not node:
            node = self._parent[node]
        return node

    def join(self, nodes: Iterable[Node]) -> None:
        roots = sorted({self.find(node) for node in nodes if node in self._parent}, key=self._order.__getitem__)
        for root in roots[1:]:
            self._parent[root] = roots[0]
            self._size[roots[0]] += self._size[root]

    def size(self, node: Node) -> int:
        return self._size[self.find(node)]
