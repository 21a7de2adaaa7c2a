"""Follow a weight input through the TRANSPOSE, RESHAPE and REVERSE operators before its consumer.

The converter puts them there. They only rearrange the weight, so they are done once, when it is stored, and leave
the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeship.lowering.litert.flatbuffer import builtin_code, constant


@dataclass(frozen=True)
class Layout:
    """How a weight lies in a stored tensor.

    Args:
        axes: for each stored axis, the weight's axis that runs along it; None for an axis of size 1 that was added.
        shape: the stored shape. flipped: the weight's axes that are stored backwards.
    """

    axes: tuple[int | None, ...]
    shape: tuple[int, ...]
    flipped: frozenset[int] = frozenset()

    def permutation(self, rank: int) -> tuple[int, ...]:
        """All ``rank`` axes of the weight: those longer than 1 in stored order, then those of size 1."""
        kept = [axis for axis, size in zip(self.axes, self.shape, strict=True) if axis is not None and size > 1]
        return (*kept, *(axis for axis in range(rank) if axis not in kept))


@dataclass(frozen=True)
class Use:
    """A tensor that carries a rearranged weight into ``operator``'s input ``slot``."""

    operator: Any
    slot: int
    layout: Layout


def start(shape: tuple[int, ...]) -> Layout:
    """A weight in its own layout."""
    return Layout(tuple(range(len(shape))), shape)


def trace(model: Any, subgraph: Any, tensor: int, layout: Layout) -> tuple[list[Use], list[Any]]:
    """Where a weight ends up, and the rearranging operators on the way, which may go.

    A rearrangement that cannot be stored (a reshape that mixes axes, a flip that is not undone) ends the walk: that
    operator itself is then the weight's use, and stays in the graph.
    """
    uses: list[Use] = []
    passed: list[Any] = []
    for operator in subgraph.operators:
        for slot, index in enumerate(operator.inputs):
            if index != tensor:
                continue
            after = _step(model, subgraph, operator, layout) if slot == 0 else None
            deeper = trace(model, subgraph, int(operator.outputs[0]), after) if after is not None else None
            if deeper is None or any(use.layout.flipped for use in deeper[0]):
                uses.append(Use(operator, slot, layout))
            else:
                uses += deeper[0]
                passed += [operator, *deeper[1]]
    return uses, passed


def _step(model: Any, subgraph: Any, operator: Any, layout: Layout) -> Layout | None:
    """The layout after one rearranging operator, or None when it is none or cannot be followed."""
    from ai_edge_litert import schema_py_generated as schema

    code = builtin_code(model, operator)
    kinds = schema.BuiltinOperator
    if code == kinds.TRANSPOSE:
        order = constant(model, subgraph.tensors[operator.inputs[1]], "int32")
        if order is None:
            return None
        axes = tuple(layout.axes[axis] for axis in order)
        return Layout(axes, tuple(layout.shape[axis] for axis in order), layout.flipped)
    if code == kinds.RESHAPE:
        shape = tuple(int(size) for size in subgraph.tensors[operator.outputs[0]].shape)
        return _reshape(layout, shape)
    if code == kinds.REVERSE_V2:
        turned = constant(model, subgraph.tensors[operator.inputs[1]], "int32")
        if turned is None:
            return None
        # Turning an axis of size 1 changes nothing.
        axes_turned = {layout.axes[axis] for axis in turned if layout.shape[axis] > 1}
        if None in axes_turned:
            return None
        return Layout(layout.axes, layout.shape, layout.flipped ^ frozenset(a for a in axes_turned if a is not None))
    return None


def _reshape(layout: Layout, shape: tuple[int, ...]) -> Layout | None:
    """Only axes of size 1 may come or go; anything else mixes the weight's axes."""
    # The axes of the weight that are longer than 1, and their sizes, in the order in which they lie.
    long_axes: list[int | None] = []
    long_sizes: list[int] = []
    for axis, size in zip(layout.axes, layout.shape, strict=True):
        if size > 1:
            long_axes.append(axis)
            long_sizes.append(size)
    if long_sizes != [size for size in shape if size > 1]:
        return None
    left = iter(long_axes)
    axes = tuple(next(left) if size > 1 else None for size in shape)
    return Layout(axes, shape, layout.flipped)
