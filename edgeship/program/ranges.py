"""What integers an input can hold, as the graph itself shows it: the table that it looks up, the axis that it indexes,
the mask that it makes.

From each integer input its uses are followed forward through operators that only move it, add to it or multiply it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from edgeship.core.model import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.export import ExportedProgram
    from torch.fx import Node

    from edgeship.program.program import TorchProgram

INTEGERS = {"i64": None, "i32": None, "i16": (-32768, 32767), "i8": (-128, 127), "u8": (0, 255), "u16": (0, 65535)}
# Operators that hand integers on as they are.
_MOVING = {
    "view", "reshape", "expand", "unsqueeze", "squeeze", "permute", "transpose", "slice", "select", "clone", "alias",
    "flatten", "contiguous", "repeat", "cat", "flip", "detach",
}  # fmt: skip
# Operators that ask whether something is so: what they are given is a mask or a flag.
_ASKING = {"eq", "ne", "gt", "ge", "lt", "le", "logical_not", "logical_and", "bitwise_not", "bitwise_and", "__and__"}
# Operators whose answer lies between the least and the largest of what they are given.
_BETWEEN = {"mean", "amax", "amin", "maximum", "minimum", "max_pool2d", "avg_pool2d"}
_LARGE = 1e3


@dataclass(frozen=True)
class _Use:
    """An integer on its way: what stands here is ``scale * input + shift``."""

    scale: int
    shift: int

    def ends(self, low: int, high: int) -> tuple[int, int]:
        """The inputs for which ``low..high`` stands here."""
        one, other = (low - self.shift) / self.scale, (high - self.shift) / self.scale
        return -int(-min(one, other) // 1), int(max(one, other) // 1)


def with_ranges(specs: Sequence[TensorSpec], exported: ExportedProgram) -> tuple[TensorSpec, ...]:
    """The inputs, those of integers with the range that the graph shows where they have none; 0 and 1 for masks and for
    what nothing shows."""

    constants = {*exported.graph_signature.inputs_to_parameters, *exported.graph_signature.inputs_to_buffers}
    nodes: list[Node] = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name not in constants]
    found = []
    for spec, node in zip(specs, nodes, strict=True):
        if spec.dtype in INTEGERS and spec.high is None:
            low, high = integer_range(node, spec, exported)
            spec = replace(spec, low=float(low), high=float(high))
        found.append(spec)
    return tuple(found)


def outputs_of_shares(program: TorchProgram) -> frozenset[str]:
    """Outputs that are shares of 1: what a sigmoid or a softmax makes, moved and joined at most."""
    nodes = {node.name: node for node in program.exported.graph.nodes}
    names = program.exported.graph_signature.user_outputs
    pairs = zip(program.signature.outputs, names, strict=True)
    return frozenset(spec.name for spec, name in pairs if _is_share(nodes[str(name)]))


def _is_share(node: Node) -> bool:
    name = _name(node)
    if name in ("sigmoid", "softmax", "_softmax") or _is_written_softmax(node):
        return True
    handed = name in _MOVING or name in _BETWEEN
    return handed and bool(node.all_input_nodes) and all(_is_share(arg) for arg in node.all_input_nodes)


def _is_written_softmax(node: Node) -> bool:
    """Whether it is ``exp(x) / sum(exp(x))``."""
    if _name(node) != "div" or _name(cast("Node", node.args[0])) != "exp":
        return False
    total = cast("Node", node.args[1])
    while getattr(total, "op", "") == "call_function" and _name(total) in _MOVING:
        total = total.all_input_nodes[0]
    return getattr(total, "op", "") == "call_function" and _name(total) == "sum" and total.args[0] is node.args[0]


def integer_range(node: Node, spec: TensorSpec, exported: ExportedProgram) -> tuple[int, int]:
    """The narrowest range that any use of an input allows, inclusive."""
    ends: list[tuple[int, int]] = []
    waiting: list[tuple[Node, _Use]] = [(node, _Use(1, 0))]
    seen: set[Node] = set()
    while waiting:
        current, use = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for user in current.users:
            if _counts_from_end(user, current):
                waiting += [(user, use)] if _name(user) == "where" else []
                continue
            shown = _shown(user, current) or _compared_with(user, current, exported)
            if shown is not None:
                ends.append(use.ends(*shown))
            else:
                further = _further(user, current, use)
                waiting += [(user, further)] if further is not None else []
    own = INTEGERS[spec.dtype]
    if not ends:
        return own or (0, 1)
    low, high = max(low for low, _ in ends), min(high for _, high in ends)
    if own is not None:
        low, high = max(low, own[0]), min(high, own[1])
    return (low, high) if low <= high else (0, 1)


def _counts_from_end(user: Node, given: Node) -> bool:
    """Whether an operator is part of ``where(i < 0, i + size, i)``: an index that may count from the end."""
    if _name(user) == "where":
        asked, raised, kept = cast("tuple[Node, Node, Node]", user.args[:3])
        return kept is given and _name(asked) == "lt" and asked.args[0] is given and given in raised.all_input_nodes
    wheres = list(user.users)
    parts = _name(user) in ("lt", "add") and user.args[0] is given
    return parts and bool(wheres) and all(_name(item) == "where" and _counts_from_end(item, given) for item in wheres)


def _compared_with(user: Node, given: Node, exported: ExportedProgram) -> tuple[int, int] | None:
    """The ends of a constant that it is compared with, as a one-hot encoding does; None for other operators."""
    import torch

    if _name(user) not in ("eq", "ne") or len(user.args) < 2:
        return None
    other = user.args[1] if user.args[0] is given else user.args[0]
    name = exported.graph_signature.inputs_to_buffers.get(str(getattr(other, "name", "")))
    value = exported.state_dict.get(name) if name is not None else None
    if value is None and name is not None:
        constant = exported.constants.get(name)
        value = constant if isinstance(constant, torch.Tensor) else None
    if value is None or value.is_floating_point() or value.dtype == torch.bool or value.numel() < 2:
        return None
    return int(value.min()), int(value.max())


def _shown(user: Node, given: Node) -> tuple[int, int] | None:
    """The range that an operator takes of what it is given; None when it hands it on or shows nothing."""
    name, args = _name(user), user.args
    if name == "embedding" and args[1] is given:
        return 0, _size(args[0], 0) - 1
    if name in ("index", "index_put") and isinstance(args[1], (list, tuple)) and given in args[1]:
        # Negative ones count from the end.
        size = _size(args[0], list(args[1]).index(given))
        return -size, size - 1
    if name in ("gather", "index_select", "scatter", "index_copy", "index_add") and len(args) > 2 and args[2] is given:
        return 0, _size(args[0], int(args[1])) - 1  # type: ignore[arg-type]
    if name == "clamp" and all(isinstance(end, int) for end in args[1:3]) and len(args) > 2:
        return int(args[1]), int(args[2])  # type: ignore[arg-type]
    if name in _ASKING:
        number = args[1] if len(args) > 1 else 0
        if name in ("eq", "ne") and not isinstance(number, (int, float)):
            return None
        if isinstance(number, (int, float)) and number not in (0, 1):
            return int(number) - 1, int(number) + 1
        return 0, 1
    if name == "rsub" or (name == "sub" and isinstance(args[0], (int, float))):
        # One minus a mask.
        return 0, 1
    if name == "mul" and isinstance(args[1], (int, float)) and abs(args[1]) > _LARGE:
        return 0, 1
    if name == "where" and args[0] is given:
        return 0, 1
    return None


def _further(user: Node, given: Node, use: _Use) -> _Use | None:
    """What stands behind an operator that moves, adds or multiplies; None where the trace ends."""
    name = _name(user)
    if name in _MOVING or name in ("to", "_to_copy"):
        return use
    number = user.args[1] if len(user.args) > 1 else None
    if user.args[:1] != (given,) or not isinstance(number, int) or isinstance(number, bool):
        return None
    if name == "add":
        return _Use(use.scale, use.shift + number)
    if name == "sub":
        return _Use(use.scale, use.shift - number)
    if name == "mul" and number != 0 and abs(number) <= _LARGE:
        return _Use(use.scale * number, use.shift * number)
    return None


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0] if node.op == "call_function" else ""


def _size(node: Any, axis: int) -> int:
    return int(node.meta["val"].shape[axis])
