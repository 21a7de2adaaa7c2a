"""Operators that the LiteRT converter turns into something its interpreter cannot run, written as ones that it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule


def rewrite_for_litert(module: GraphModule) -> None:
    """Replace, in place, the operators in this file's table by ``torch.ops.tfl`` and plain ones."""
    import litert_torch.backend.experimental.torch_tfl  # noqa: F401  registers torch.ops.tfl
    import torch

    table: dict[Any, Callable[..., Any]] = {torch.ops.aten.topk.default: _topk, torch.ops.aten.sort.default: _sort}
    for node in list(module.graph.nodes):
        replace = table.get(node.target) if node.op == "call_function" else None
        if replace is None:
            continue
        with module.graph.inserting_before(node):
            new = module.graph.call_function(replace, node.args, node.kwargs)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    module.recompile()


def _topk(
    value: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """TOPK_V2 sees the last axis and the largest values only. The converter's own form is a STABLEHLO_SORT."""
    import torch

    swapped = value.transpose(dim, -1) if value.dim() else value
    found, places = torch.ops.tfl.topk_v2(swapped if largest else -swapped, k)
    found = found if largest else -found
    if value.dim():
        found, places = found.transpose(dim, -1), places.transpose(dim, -1)
    return found, places.to(torch.int64)


def _sort(value: torch.Tensor, dim: int = -1, descending: bool = False) -> Any:
    """All of an axis, largest or smallest first, is its top k. Ties may come in another order than torch's."""
    return _topk(value, value.shape[dim] if value.dim() else 1, dim, descending)
