"""Which outputs of a program hold rows that it chose by their scores: the best ``k``, or what a suppression keeps.

Such rows are a set. Where two scores nearly tie, another rounding has them in another order, and every row is right.
What they are is told by the graph: rows in the order of a ``topk`` or ``sort`` stay rows through operators that work
row by row; and by the load step, which writes how many of the rows of a model that chooses by values count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from edgeship.program.counted import Counted

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Node

    from edgeship.core.model import Signature
    from edgeship.program.program import TorchProgram
    from edgeship.program.rows.wrapped import Told

# Operators that hand elements on from one place to another.
_CASTING, _FILLING = {"_to_copy", "to", "contiguous"}, {"constant_pad_nd", "pad"}
_MOVING = (
    {"cat", "stack", "clone", "reshape", "narrow", "select_scatter", "slice_scatter", "copy"} | _CASTING | _FILLING
)
_SPLITTING = {"split", "split_with_sizes", "chunk", "unbind", "tensor_split"}
# Layers that keep all axes but the last.
_ROW_BY_ROW = {"linear", "layer_norm", "native_layer_norm", "rms_norm", "addmm"}
# Operators along one axis or some, which are gone behind them or of one element.
_REDUCING = {"sum", "mean", "amax", "amin", "argmax", "argmin", "max", "min", "any", "all", "prod", "softmax",
    "_softmax", "log_softmax", "_log_softmax", "cumsum", "logsumexp"}  # fmt: skip
# Tensors of more elements are not followed: masks of whole images.
MOST_TRACED = 1 << 24


@dataclass(frozen=True)
class RowSet:
    """Outputs whose rows were chosen together: row ``i`` of each belongs to row ``i`` of the others.

    Args:
        axes: output -> the axis of its rows. count: the output that says how many count; empty where all do.
    """

    axes: dict[str, int]
    count: str = ""


# Of a tensor: axis -> what ordered it, as a number, from which place on, and how many elements in line are of one row.
_Made = tuple[int, int, int]
_Order = dict[int, _Made]
_NEITHER = (-1, 0, 1)


def counted_outputs(signature: Signature, told: Told | None, own: int) -> dict[str, Counted]:
    """What the load step knows of rows that count.

    Args:
        told: of a module whose rows values choose. own: how many outputs are the module's; their counts follow.
    """
    names = [spec.name for spec in signature.outputs]
    pairs = zip(names[:own], told.counts if told else [None] * own, strict=True)
    return {name: Counted(names[own + rows[0]], rows[1]) for name, rows in pairs if rows is not None}


def row_sets(program: TorchProgram) -> tuple[RowSet, ...]:
    """The outputs of a program that hold chosen rows, those that were chosen together in one set."""
    names = {spec.name for spec in program.signature.outputs}
    found: dict[tuple[Any, ...], dict[str, int]] = {}
    counted = program.record.counted
    for name, rows in counted.items():
        if name in names and rows.count in names:
            found.setdefault((rows.count,), {})[name] = rows.axis
    taken = {name for axes in found.values() for name in axes} | {rows.count for rows in counted.values()}
    for name, (axis, key) in _ordered_outputs(program.exported, program.signature).items():
        if name not in taken:
            found.setdefault(key, {})[name] = axis
    return tuple(RowSet(axes, key[0] if len(key) == 1 else "") for key, axes in found.items())


def _ordered_outputs(exported: ExportedProgram, signature: Signature) -> dict[str, tuple[int, tuple[Any, ...]]]:
    """Output -> the first axis that an order by values made, and what tells orders apart."""
    orders = _Orders()
    for node in exported.graph.nodes:
        orders.see(node)
    nodes = {node.name: node for node in exported.graph.nodes}
    found = {}
    for spec, name in zip(signature.outputs, exported.graph_signature.user_outputs, strict=True):
        node = nodes.get(str(name))
        order = orders.of.get(node, {}) if node is not None else {}
        order = {axis: made for axis, made in order.items() if made[2] == 1}
        if order:
            axis = min(order)
            # Rows of two sizes are no pairs.
            found[spec.name] = (axis, (*order[axis], math.prod(spec.shape[:axis]), spec.shape[axis]))
    return found


class _Orders:
    """Follows orders through a graph, node by node."""

    def __init__(self) -> None:
        self.of: dict[Node, _Order] = {}
        # Equal computations of equal values have one number.
        self._numbers: dict[Any, int] = {}
        self._known: dict[tuple[Any, ...], int] = {}

    def see(self, node: Node) -> None:
        """Note the order of a node's result; those that it is made of come before it."""
        self._numbers[node] = self._number(node)
        if node.op != "call_function":
            return
        found = self._order(node)
        if found:
            self.of[node] = found

    def _number(self, node: Node) -> int:
        parts: Any = ("leaf", node.op, str(node.target))
        if node.op == "call_function":
            parts = (node.target, self._plain(node.args), self._plain(sorted(node.kwargs.items())))
        return self._known.setdefault(parts, len(self._known))

    def _plain(self, value: Any) -> Any:
        from torch.fx import Node

        if isinstance(value, Node):
            return ("node", self._numbers[value])
        if isinstance(value, (list, tuple)):
            return tuple(map(self._plain, value))
        return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)

    def _order(self, node: Node) -> _Order:
        name = _name(node)
        value = _value(node)
        if name in ("sort", "topk"):
            return {}
        if name == "getitem":
            return self._chosen(node)
        if value is None:
            return {}
        if name in ("index_select", "gather", "index", "embedding"):
            return self._picked(node, name)
        if name in ("matmul", "mm", "bmm"):
            return self._product(node)
        if name == "scaled_dot_product_attention":
            return {axis: made for axis, made in self._first(node).items() if axis < value.dim() - 1}
        if name in _ROW_BY_ROW:
            first = node.args[1] if name == "addmm" else node.args[0]
            return {axis: made for axis, made in self._orders_of(first).items() if axis < value.dim() - 1}
        if name in _REDUCING:
            return self._reduced(node, value)
        if _is_moving(node):
            return self._moved(node)
        return self._by_element(node) if _is_pointwise(node) else {}

    def _orders_of(self, part: object) -> _Order:
        return self.of.get(cast("Node", part), {})

    def _first(self, node: Node) -> _Order:
        return self._orders_of(node.args[0])

    def _chosen(self, node: Node) -> _Order:
        """One of several results: values or places of a ``sort`` or ``topk``, a part of what is split, a reduction."""
        source: Any = node.args[0]
        value = _value(node)
        if _name(source) in _SPLITTING:
            return self._moved(source, _number_in(node.args[1]))
        if _name(source) in _REDUCING:
            return self._reduced(source, value)
        if _name(source) not in ("sort", "topk") or value is None or not value.dim():
            return {}
        best = _name(source) == "topk"
        axis = _said(source, "dim", 2 if best else 1, -1) % value.dim()
        falling = _said(source, "largest" if best else "descending", 3 if best else 2, best)
        # ``topk`` of a few and ``sort`` of all begin alike.
        key = ("order", self._plain(source.args[0]), axis, bool(falling))
        before = {place: made for place, made in self._first(source).items() if place != axis}
        return {**before, axis: (self._known.setdefault(key, len(self._known)), 0, 1)}

    def _picked(self, node: Node, name: str) -> _Order:
        """What is taken by places is in the order of the places."""
        if name == "index_select":
            axis = _number_in(node.args[1]) % _shape_rank(node.args[0])
            found = {key: made for key, made in self._first(node).items() if key != axis}
            places = self._orders_of(node.args[2])
            return {**found, axis: places[0]} if 0 in places else found
        if name == "gather":
            axis = _number_in(node.args[1]) % _shape_rank(node.args[0])
            places = self._orders_of(node.args[2])
            given = self._first(node)
            return {place: made for place, made in places.items() if place == axis or given.get(place) == made}
        if name == "embedding":
            return dict(self._orders_of(node.args[1]))
        return self._indexed(node)

    def _indexed(self, node: Node) -> _Order:
        """By tensors for axes beside each other: their own axes, from the right, stand where the first of them is."""
        indices: Any = node.args[1]
        given = [place for place, index in enumerate(indices) if index is not None]
        if given != list(range(given[0], given[0] + len(given))):
            return {}
        rank = max(_shape_rank(indices[place]) for place in given)
        found: _Order = {}
        for place in given:
            shift = given[0] + rank - _shape_rank(indices[place])
            for axis, made in self._orders_of(indices[place]).items():
                found[axis + shift] = made if found.get(axis + shift, made) == made else _NEITHER
        return {axis: made for axis, made in found.items() if made != _NEITHER}

    def _product(self, node: Node) -> _Order:
        left, right = node.args[:2]
        rank = _shape_rank(node)
        found = {}
        for part, own in ((left, -2), (right, -1)):
            size = _shape_rank(part)
            made = self._orders_of(part).get(size + own)
            if made is not None and size >= 2:
                found[rank + own] = made
        return found

    def _reduced(self, node: Node, value: torch.Tensor | None) -> _Order:
        """Rows are left on the axes that are not gone; ``value`` has the shape of the result."""
        first = node.args[0]
        rank = _shape_rank(first)
        dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        if value is None or not isinstance(dims, (int, list, tuple)):
            return {}
        axes = [axis % max(rank, 1) for axis in ([dims] if isinstance(dims, int) else dims)]
        found = {}
        for axis, made in self._first(node).items():
            if axis not in axes:
                gone = 0 if value.dim() == rank else sum(1 for item in axes if item < axis)
                found[axis - gone] = made
        return found

    def _by_element(self, node: Node) -> _Order:
        rank = _shape_rank(node)
        found: _Order = {}
        for part in node.all_input_nodes:
            shift = rank - _shape_rank(part)
            size = _value(part)
            for axis, made in self._orders_of(part).items():
                if size is None or size.shape[axis] < 2:
                    continue
                if found.setdefault(axis + shift, made) != made:
                    # Rows of two orders beside each other are in neither.
                    found[axis + shift] = _NEITHER
        return {axis: made for axis, made in found.items() if made != _NEITHER}

    def _moved(self, node: Node, place: int | None = None) -> _Order:
        """Where the rows of the inputs lie in the result, or in one of several, by moving the numbers of the rows."""
        found: _Order = {}
        for part in node.all_input_nodes:
            for axis, (number, start, each) in self._orders_of(part).items():
                to = _moved_axis(node, part, axis, each, place)
                if to is not None:
                    made = (number, start + to[1], to[2])
                    found[to[0]] = made if found.get(to[0], made) == made else _NEITHER
        return {axis: made for axis, made in found.items() if made != _NEITHER}


def _moved_axis(node: Node, source: Node, axis: int, each: int, part_place: int | None) -> tuple[int, int, int] | None:
    """On which axis of the result the rows of ``source`` lie in their order, the first of them, and how many elements
    in line are of one row; None where they lie on no one.

    Args:
        each: elements in line of one row of the source. part_place: which of several results; None where there is one.
    """
    import torch
    from torch.fx.node import map_arg

    values = {part: _value(part) for part in node.all_input_nodes}
    if any(value is None or value.numel() > MOST_TRACED for value in values.values()):
        return None

    def stand_in(part: Node) -> Any:
        value = values[part]
        assert value is not None
        if part is not source:
            return torch.full(value.shape, -1, dtype=torch.int64)
        shape = [1] * value.dim()
        shape[axis] = -1
        # [...] whose elements are the numbers of their rows.
        numbers = torch.div(torch.arange(value.shape[axis]), each, rounding_mode="floor")
        return numbers.reshape(shape).expand(value.shape).contiguous()

    args, kwargs = cast("Any", map_arg(node.args, stand_in)), cast("Any", map_arg(node.kwargs, stand_in))
    target: Any = node.target
    result: Any
    if _name(node) in _CASTING:
        result = args[0]
    elif _name(node) in _FILLING:
        result = target(args[0], args[1], *(["constant"] if _name(node) == "pad" else []), -1)
    else:
        result = target(*args, **kwargs)
    if part_place is not None:
        result = result[part_place]
    for place in range(result.dim()):
        found = _rows_on(result, place)
        if found is not None:
            return (place, *found)
    return None


def _rows_on(numbers: torch.Tensor, axis: int) -> tuple[int, int] | None:
    """The first row and how many elements in line are of one, where an axis holds rows in their order, with -1 for
    what is of none; ``numbers`` of rows in any shape."""
    import torch

    # [..., size, ...] -> [size, elements]
    lines = numbers.movedim(axis, 0).reshape(numbers.shape[axis], -1)
    highest = lines.max(1).values if lines.numel() else lines.new_zeros(0)
    count = int((highest >= 0).sum())
    # What is filled up stands behind.
    front = highest[:count]
    if count < 2 or bool((front < 0).any()) or int(front[0]) == int(front[-1]):
        return None
    each = int((front == front[0]).sum())
    steps = torch.div(torch.arange(count), each, rounding_mode="floor")
    alike = bool(((lines == highest[:, None]) | (lines < 0)).all())
    return (int(front[0]), each) if alike and torch.equal(front - front[0], steps) else None


def _is_moving(node: Node) -> bool:
    from edgeship.compat.torch import is_view

    return _name(node) in _MOVING or is_view(node.target)


def _is_pointwise(node: Node) -> bool:
    import torch

    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or _name(node) == "where"


def _said(node: Node, name: str, place: int, otherwise: Any) -> Any:
    """An argument by its name or its place."""
    return node.kwargs.get(name, node.args[place] if len(node.args) > place else otherwise)


def _number_in(argument: object) -> int:
    return int(cast("int", argument))


def _name(node: object) -> str:
    """The operator's name without its overload."""
    target = getattr(node, "target", "")
    return str(getattr(target, "__name__", target)).split(".")[0]


def _value(node: object) -> torch.Tensor | None:
    import torch

    value = getattr(node, "meta", {}).get("val")
    return value if isinstance(value, torch.Tensor) else None


def _shape_rank(node: object) -> int:
    value = _value(node)
    return 0 if value is None else value.dim()
