"""Tensors of many axes, written with few: Core ML and Hexagon hold no more than five.

Axes that an operator treats alike and that lie side by side are one axis for it. So an operator is a reshape, itself on
fewer axes, and a reshape back; reshapes that meet are one, and the tensor of many axes is never made.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node

# What Core ML (MIL's tensors) and Hexagon (QNN's operators) hold; other formats hold more.
MOST_AXES = 5
# Operators spelled out in others may bring in such tensors themselves.
ROUNDS = 3


def with_few_axes(program: ExportedProgram) -> ExportedProgram:
    """The program with no tensor above `MOST_AXES` axes, but for inputs, outputs and what no rule here knows.

    Args:
        program: not changed.

    Returns:
        One that answers alike; itself where no tensor has more.
    """
    for _ in range(ROUNDS):
        high = [node for node in program.graph.nodes if node.op == "call_function" and _is_high(node)]
        if not high:
            break
        program = program.run_decompositions(_rules({node.target for node in high}))
        _join_views(program.graph_module)
    return program


def _is_high(node: Node) -> bool:
    """Whether a node makes or reads a tensor of too many axes."""
    import torch

    for item in (node, *node.all_input_nodes):
        value = item.meta.get("val")
        for part in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(part, torch.Tensor) and part.dim() > MOST_AXES:
                return True
    return False


def _join_views(module: GraphModule) -> None:
    """A reshape of a reshape is one reshape."""
    import torch

    aten = torch.ops.aten
    views = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
    for node in module.graph.nodes:
        if node.target not in views:
            continue
        source = node.args[0]
        while source.target in views or (source.target == aten.clone.default and _is_high(source)):
            source = source.args[0]
        # What lies between may have made the memory contiguous.
        node.target, node.args = aten.reshape.default, (source, [int(size) for size in node.meta["val"].shape])
    module.graph.eliminate_dead_code()
    module.recompile()


def _rules(targets: set[Any]) -> dict[Any, Callable[..., Any]]:
    """How the operators of a program, and those that torch spells them out in, are written with few axes."""
    import torch

    from edgeship.compat.torch import is_operator

    aten = torch.ops.aten
    rules: dict[Any, Callable[..., Any]] = {}
    arithmetic = {aten.add.Tensor, aten.mul.Tensor, aten.where.self}
    casts = {aten._to_copy.default, aten.to.dtype, aten.hardswish.default, aten.floor_divide.default}
    # A copy is no arithmetic: a reshape makes one itself, and `_join_views` drops it.
    for target in (targets | arithmetic | casts) - {aten.clone.default}:
        if is_operator(target) and (target in casts or torch.Tag.pointwise in target.tags):
            rules[target] = functools.partial(_element_by_element, target)
    summing = (
        aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.var.correction,
        aten.std.correction, aten.std.dim, aten.var.dim, aten.logsumexp.default, aten.any.dims, aten.all.dims,
    )  # fmt: skip
    along = (
        aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default, aten.slice.Tensor,
        aten.select.int, aten.index_select.default, aten.flip.default, aten.roll.default, aten.unbind.int,
        aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.narrow.default, aten.cumsum.default,
        aten.argmax.default, aten.argmin.default, aten.topk.default, aten.max.dim, aten.min.dim, aten.glu.default,
        aten.prod.dim_int, aten.sort.default, aten.any.dim, aten.all.dim,
    )  # fmt: skip
    rules |= {target: functools.partial(_along, target, summing=False) for target in along}
    rules |= {target: functools.partial(_along, target, summing=True) for target in summing}
    last = (aten.linear.default, aten.layer_norm.default, aten.rms_norm.default)
    rules |= {target: functools.partial(_on_last, target) for target in last}
    return {
        **rules,
        aten.permute.default: _permute,
        aten.transpose.int: _transpose,
        aten.expand.default: _expand,
        aten.repeat.default: _repeat,
        aten.cat.default: _cat,
        aten.stack.default: _stack,
        aten.matmul.default: _matmul,
        aten.unsqueeze.default: _unsqueeze,
        aten.squeeze.dim: _squeeze,
        aten.squeeze.dims: _squeeze,
        aten.index.Tensor: _index,
    }


# Forms of operators. Each returns NotImplemented for tensors of few axes, which leaves an operator as it is.


def _few(*tensors: Tensor) -> bool:
    return all(tensor.dim() <= MOST_AXES for tensor in tensors)


def _element_by_element(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Tensors that broadcast, [..], as ones with their axes merged."""
    import torch

    given = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if _few(*given):
        return NotImplemented
    shape = list(torch.broadcast_shapes(*[tensor.shape for tensor in given]))  # type: ignore[no-untyped-call]
    made = iter(_merged(given, shape))
    few = [next(made) if isinstance(arg, torch.Tensor) else arg for arg in args]
    return target(*few, **kwargs).reshape(shape)


def _along(target: Any, *args: Any, summing: bool, **kwargs: Any) -> Any:
    """An operator that names axes of ``x``, [..]: what lies before, between and behind them is one axis each.

    Args:
        summing: each named axis goes, or becomes 1, and several in a row are as one.
    """
    from edgeship.compat.torch import schema_of

    schema: Any = schema_of(target)
    said = {argument.name: argument.default_value for argument in schema.arguments}
    said |= {**dict(zip(said, args, strict=False)), **kwargs}
    x, word = said["self"], "dims" if "dims" in said else "dim"
    if _few(x):
        return NotImplemented
    dims = said[word]
    axes = _counted([dims] if isinstance(dims, int) else dims or range(x.dim()), x.dim())
    sizes, places = _around(x.shape, axes, summing)
    if len(sizes) > MOST_AXES:
        return NotImplemented
    named = [places[axis] for axis in axes]
    said |= {"self": x.reshape(sizes), word: named[0] if isinstance(dims, int) else list(dict.fromkeys(named))}
    found = target(**said)
    back = functools.partial(_back, shape=x.shape, places=places, rank=len(sizes))
    return [back(part) for part in found] if isinstance(found, (tuple, list)) else back(found)


def _counted(dims: Sequence[int], rank: int) -> list[int]:
    """Axes counted from the front."""
    return [dim % rank for dim in dims]


def _around(shape: Sequence[int], axes: Sequence[int], summing: bool) -> tuple[list[int], dict[int, int]]:
    """The sizes of ``shape`` with all but ``axes`` merged, and where each of those is then."""
    sizes: list[int] = []
    places: dict[int, int] = {}
    before: bool | None = None
    for axis, size in enumerate(shape):
        named = axis in axes
        if named == before and (summing or not named):
            sizes[-1] *= size
        else:
            sizes.append(size)
        if named:
            places[axis] = len(sizes) - 1
        before = named
    return sizes, places


def _back(found: Tensor, shape: Sequence[int], places: dict[int, int], rank: int) -> Tensor:
    """What came of the merged axes with those of ``shape``; of named ones what is left, which may be nothing."""
    if found.dim() < rank:
        return found.reshape([size for axis, size in enumerate(shape) if axis not in places])
    alone = len(set(places.values())) == len(places)
    sizes = list(shape)
    for axis, place in places.items():
        # Several that are one have been summed up.
        sizes[axis] = found.shape[place] if alone else 1
    return found.reshape(sizes)


def _on_last(target: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A layer that works on the last axes of ``x``, [.., last]: the others are one axis."""
    import torch

    if _few(x):
        return NotImplemented
    kept = 1 if target == torch.ops.aten.linear.default else len(args[0])
    found = target(x.reshape(-1, *x.shape[-kept:]), *args, **kwargs)
    # [rows, last] -> [.., last]
    return found.reshape(*x.shape[:-kept], *found.shape[1:])


def _permute(x: Tensor, dims: Sequence[int]) -> Any:
    """``x`` of any axes."""
    return NotImplemented if _few(x) else permuted(x, dims)


def _transpose(x: Tensor, first: int, second: int) -> Any:
    """``x`` of any axes."""
    if _few(x):
        return NotImplemented
    order = list(range(x.dim()))
    order[first], order[second] = order[second], order[first]
    return permuted(x, order)


def _expand(x: Tensor, size: Sequence[int], *, implicit: bool = False) -> Any:
    """``x`` [..] to ``size``, where -1 keeps an axis."""
    if len(size) <= MOST_AXES:
        return NotImplemented
    had = [1] * (len(size) - x.dim()) + list(x.shape)
    return _spread(x, had, [old if new == -1 else new for old, new in zip(had, size, strict=True)])


def _repeat(x: Tensor, repeats: Sequence[int]) -> Any:
    """``x`` [..] as often along each axis as said: [.., repeats * size, ..]."""
    if len(repeats) <= MOST_AXES:
        return NotImplemented
    shape = [1] * (len(repeats) - x.dim()) + list(x.shape)
    for axis, count in enumerate(repeats):
        if count == 1:
            continue
        before, rest = math.prod(shape[:axis]), math.prod(shape[axis:])
        # [before, rest] -> [before, count, rest]
        x = x.reshape(before, 1, rest).expand(before, count, rest)
        shape[axis] *= count
    return x.reshape(shape)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """Tensors [.., size, ..] that differ along ``dim``."""
    import torch

    tensors = [tensor for tensor in tensors if tensor.shape != (0,)]
    if not tensors or _few(*tensors):
        return NotImplemented
    shape = list(tensors[0].shape)
    axis = dim % len(shape)
    before, behind = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    parts = [tensor.reshape(before, tensor.shape[axis], behind) for tensor in tensors]
    shape[axis] = sum(part.shape[1] for part in parts)
    return torch.cat(parts, 1).reshape(shape)


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """Tensors of one shape [..] along a new axis."""
    import torch

    shape = list(tensors[0].shape)
    if len(shape) < MOST_AXES:
        return NotImplemented
    axis = dim % (len(shape) + 1)
    before = math.prod(shape[:axis])
    parts = [tensor.reshape(before, 1, -1) for tensor in tensors]
    return torch.cat(parts, 1).reshape([*shape[:axis], len(parts), *shape[axis:]])


def _matmul(x: Tensor, y: Tensor) -> Any:
    """``x`` [.., n, k] and ``y`` [.., k, m], or [k] for either, with leading axes that broadcast."""
    import torch

    if _few(x, y):
        return NotImplemented
    if y.dim() <= 2:
        # [.., n, k] -> [rows, k]
        found = x.reshape(-1, x.shape[-1]) @ y
        return found.reshape([*x.shape[:-1], *found.shape[1:]])
    left = x if x.dim() > 1 else x.reshape(1, -1)
    ahead = list(torch.broadcast_shapes(left.shape[:-2], y.shape[:-2]))  # type: ignore[no-untyped-call]
    parts = []
    for part in (left, y):
        whole = [*ahead, *part.shape[-2:]]
        # [.., n, k] -> [all of them, n, k]
        parts.append(_spread(part, _padded(part.shape, len(whole)), whole).reshape(-1, *part.shape[-2:]))
    found = parts[0] @ parts[1]
    return found.reshape([*ahead, *x.shape[-2:-1], y.shape[-1]])


def _unsqueeze(x: Tensor, dim: int) -> Any:
    """``x`` of any axes, with one of size 1 more."""
    if x.dim() < MOST_AXES:
        return NotImplemented
    axis = dim % (x.dim() + 1)
    return x.reshape([*x.shape[:axis], 1, *x.shape[axis:]])


def _squeeze(x: Tensor, dim: int | Sequence[int]) -> Any:
    """``x`` of any axes, without those of ``dim`` that have size 1."""
    if _few(x):
        return NotImplemented
    gone = _counted([dim] if isinstance(dim, int) else dim, x.dim())
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in gone or size != 1])


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """``x`` of any axes, with a list of places along one of them."""
    import torch

    named = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if _few(x) or len(named) != 1 or named[0][1].dim() != 1 or named[0][1].dtype == torch.bool:
        return NotImplemented
    return _along(torch.ops.aten.index_select.default, x, *named[0], summing=False)


# Axes that are merged


def _merged(tensors: Sequence[Tensor], shape: Sequence[int]) -> list[Tensor]:
    """Tensors that broadcast to ``shape`` with neighbouring axes as one where they broadcast alike.

    Where more than `MOST_AXES` would remain, tensors are repeated first.
    """
    made = list(tensors)
    while True:
        ahead = [_padded(tensor.shape, len(shape)) for tensor in made]
        sizes = _alike(ahead, shape)
        if len(sizes[0]) <= MOST_AXES:
            return [tensor.reshape(size) for tensor, size in zip(made, sizes, strict=True)]
        place = next(place for place, size in enumerate(ahead) if size != list(shape))
        made[place] = _spread(made[place], ahead[place], shape)


def _padded(shape: Sequence[int], rank: int) -> list[int]:
    return [1] * (rank - len(shape)) + list(shape)


def _alike(shapes: Sequence[Sequence[int]], whole: Sequence[int]) -> list[list[int]]:
    """Shapes that broadcast to ``whole`` with neighbouring axes merged where the same ones of them are repeated."""
    made: list[list[int]] = [[] for _ in shapes]
    before: list[bool] = []
    for axis, size in enumerate(whole):
        repeated = [shape[axis] != size for shape in shapes]
        if size == 1:
            continue
        for sizes, shape in zip(made, shapes, strict=True):
            if repeated == before:
                sizes[-1] *= shape[axis]
            else:
                sizes.append(shape[axis])
        before = repeated
    return made


def _spread(x: Tensor, had: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """``x``, of shape ``had`` but for axes of size 1, repeated to ``wanted``, an axis at a time."""
    shape = list(had)
    for axis, size in enumerate(wanted):
        if shape[axis] == size:
            continue
        before = math.prod(shape[:axis])
        # [before, behind] -> [before, size, behind]
        x = x.reshape(before, 1, -1).expand(-1, size, -1)
        shape[axis] = size
    return x.reshape(shape)


# Axes that change places


def permuted(x: Tensor, dims: Sequence[int], most: int = MOST_AXES) -> Tensor:
    """``x.permute(dims)`` in permutes of no more than ``most`` axes, 3 or more; ``x`` of any axes."""
    order = _counted(dims, x.dim())
    shape = [x.shape[axis] for axis in order]
    sizes = {axis: size for axis, size in enumerate(x.shape) if size != 1}
    for blocks, moved in permutes(list(sizes), [axis for axis in order if axis in sizes], most):
        merged = [math.prod(map(sizes.__getitem__, block)) for block in blocks]
        x = x.reshape(merged).permute(moved)
    return x.reshape(shape)


def permutes(axes: Sequence[int], goal: Sequence[int], most: int) -> list[tuple[list[list[int]], tuple[int, ...]]]:
    """How to bring ``axes`` into the order of ``goal`` by moving no more than ``most`` blocks of them at a time.

    Returns:
        For each step the blocks, which are those axes in the order that they are in, and how they are permuted.
    """
    steps = []
    runs = _runs(axes, goal)
    while len(runs) > 1:
        blocks = [[*run] for run in runs]
        order: tuple[int, ...] = tuple(_places(runs, goal))
        if len(runs) > most:
            blocks, order = min(_moves(runs, most), key=lambda move: len(_runs(_after(*move), goal)))
        steps.append((blocks, order))
        axes = _after(blocks, order)
        runs = _runs(axes, goal)
    return steps


def _runs(axes: Sequence[int], goal: Sequence[int]) -> list[list[int]]:
    """``axes`` in blocks that follow each other in ``goal`` as well; their number is what is left to do."""
    place = {axis: number for number, axis in enumerate(goal)}
    runs: list[list[int]] = []
    for axis in axes:
        if runs and place[axis] == place[runs[-1][-1]] + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    return runs


def _places(runs: Sequence[Sequence[int]], goal: Sequence[int]) -> list[int]:
    """The numbers of ``runs`` in the order of ``goal``."""
    return sorted(range(len(runs)), key=lambda number: goal.index(runs[number][0]))


def _moves(runs: Sequence[Sequence[int]], most: int) -> Iterator[tuple[list[list[int]], tuple[int, ...]]]:
    """Every way to cut ``runs`` into ``most`` blocks and to permute those."""
    for cuts in itertools.combinations(range(1, len(runs)), most - 1):
        edges = zip((0, *cuts), (*cuts, len(runs)), strict=True)
        blocks = [list(itertools.chain(*runs[start:end])) for start, end in edges]
        for order in itertools.permutations(range(most)):
            yield blocks, order


def _after(blocks: Sequence[Sequence[int]], order: Sequence[int]) -> list[int]:
    return list(itertools.chain(*[blocks[number] for number in order]))
