"""Operators that the LiteRT converter turns into something its interpreter cannot run, written as ones that it can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeship.lowering.convolutions import convolution_by_depth, transposed_convolution
from edgeship.lowering.operators import index_put, shorten_sorts
from edgeship.program.windows import whole_windows

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule


def rewrite_for_litert(module: GraphModule) -> None:
    """Replace, in place, the operators in this file's table by ``torch.ops.tfl`` and plain ones."""
    import torch

    aten = torch.ops.aten
    table: dict[Any, Callable[..., Any]] = {
        aten.topk.default: _topk,
        aten.sort.default: _sort,
        aten.index_put.default: index_put,
        aten.conv_transpose1d.default: transposed_convolution,
        aten.conv_transpose2d.input: transposed_convolution,
        aten.conv3d.default: convolution_by_depth,
        aten.max_pool1d.default: whole_windows,
        aten.max_pool2d.default: whole_windows,
        aten.max_pool3d.default: whole_windows,
    }
    shorten_sorts(module.graph)
    for node in list(module.graph.nodes):
        replace = table.get(node.target) if node.op == "call_function" else None
        if replace is None:
            continue
        with module.graph.inserting_before(node):
            new = module.graph.call_function(_or_as_it_is(replace, node.target), node.args, node.kwargs)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    module.recompile()


def _or_as_it_is(replace: Callable[..., Any], target: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        found = replace(*args, **kwargs)
        return target(*args, **kwargs) if found is NotImplemented else found

    return call


# Operators of the converter's program whose sides differ.
ONE_SIDED = ("stablehlo.subtract", "stablehlo.divide", "tfl.sub", "tfl.div")


def hide_left_constants(module: Any) -> int:
    """Let the converter not see that what is subtracted from, or divided, is a constant: put a barrier behind it.

    Where litert-converter 0.5.0 moves a transpose over ``constant - x`` or ``constant / x`` it writes ``x - constant``
    and ``x / constant``, without a word. Drop this when `tests/lowering/litert/test_rewrites.py` passes without.

    Args:
        module: what the converter lowered a program to, changed in place.

    Returns:
        How many barriers there are.
    """
    from edgeship.compat import litert

    ir, stablehlo = litert.mlir(), litert.stablehlo()
    calls: dict[str, list[Any]] = {}
    for operation in _walk(module.operation):
        if operation.name in ("func.call", "call"):
            calls.setdefault(ir.FlatSymbolRefAttr(operation.attributes["callee"]).value, []).append(operation)
    found = [operation for operation in _walk(module.operation) if operation.name in ONE_SIDED]
    hidden = [item for item in found if _is_alone(item) and _is_constant(item.operands[0], calls)]
    with module.context:
        for operation in hidden:
            with ir.InsertionPoint(operation), operation.location:
                barrier = stablehlo.OptimizationBarrierOp([operation.operands[0]])
            operation.operands[0] = barrier.operation.results[0]
    return len(hidden)


def _is_alone(operation: Any) -> bool:
    """Whether a difference or quotient is all that its function computes: in others the converter knows a sigmoid by
    ``1 / (1 + exp(-x))``, and would not with a barrier in it."""
    shaping = ("broadcast_in_dim", "constant", "convert", "reshape", "return", "optimization_barrier")
    others = [item for item in operation.block if item.operation.name.rpartition(".")[2] not in shaping]
    return len(others) == 1 or operation.name.startswith("tfl.")


def _walk(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _walk(inner.operation)


def _is_constant(value: Any, calls: Mapping[str, Sequence[Any]], depth: int = 12) -> bool:
    """Whether a value of the converter's program depends on constants only, in one call of its function at least."""
    from edgeship.compat.litert import mlir

    ir, owner = mlir(), value.owner
    if depth == 0:
        return False
    if isinstance(owner, ir.Block):
        function = owner.owner
        named = "sym_name" in function.attributes
        called = calls.get(ir.StringAttr(function.attributes["sym_name"]).value, ()) if named else ()
        place = ir.BlockArgument(value).arg_number
        return any(_is_constant(call.operands[place], calls, depth - 1) for call in called)
    operands = list(owner.operands)
    given = bool(operands) and all(_is_constant(item, calls, depth - 1) for item in operands)
    return "constant" in owner.name or given


def _topk(
    value: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """TOPK_V2 sees the last axis and the largest values only. The converter's own form is a STABLEHLO_SORT."""
    import torch

    from edgeship.compat.litert import tfl_operators

    swapped = value.transpose(dim, -1) if value.dim() else value
    found, places = tfl_operators().topk_v2(swapped if largest else -swapped, k)
    found = found if largest else -found
    if value.dim():
        found, places = found.transpose(dim, -1), places.transpose(dim, -1)
    return found, places.to(torch.int64)


def _sort(value: torch.Tensor, dim: int = -1, descending: bool = False) -> Any:
    """All of an axis, largest or smallest first, is its top k. Ties may come in another order than torch's."""
    return _topk(value, value.shape[dim] if value.dim() else 1, dim, descending)
