"""Rewrites of the exported graph for operators that coremltools 9.0's torch.export front end lacks.

`REWRITES` is the table: an operator, and a function of torch operators that coremltools does have. The functions are
traced in the operator's place, so shapes and dtypes stay right. What is not in the table is decomposed by torch's own
rules, when torch has one. An entry is dropped when coremltools has the operator and its test passes without the entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
from coremltools.converters.mil.frontend.torch.utils import sanitize_op_kind
from torch._decomp import decomposition_table

from edgeship.errors import UnsupportedOpError
from edgeship.program.provenance import where

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import Node

aten = torch.ops.aten

# Rewrites may bring in operators that need rewriting themselves.
MAX_ROUNDS = 4


def rewritten(exported: ExportedProgram) -> ExportedProgram:
    """The program in operators that coremltools converts.

    Raises:
        UnsupportedOpError: neither the table nor torch has a rewrite for an operator.
    """
    defaults = torch.export.default_decompositions()
    exported = exported.run_decompositions(dict(REWRITES))
    for _ in range(MAX_ROUNDS):
        _drop_copies(exported)
        lacking = [node for node in exported.graph.nodes if node.op == "call_function" and not _known(node)]
        if not lacking:
            return exported
        table = dict(REWRITES)
        for node in lacking:
            rule = decomposition_table.get(node.target) or defaults.get(node.target)
            if rule is None:
                raise _unsupported(node)
            table[node.target] = rule
        exported = exported.run_decompositions(table)
    raise _unsupported(lacking[0])


def _known(node: Node) -> bool:
    name = (
        node.target.name() if isinstance(node.target, torch._ops.OpOverload) else getattr(node.target, "__name__", "")
    )
    return sanitize_op_kind(name) in _TORCH_OPS_REGISTRY


def _unsupported(node: Node) -> UnsupportedOpError:
    return UnsupportedOpError(
        f"Core ML's converter has no lowering for {node.target} at {where(node)}",
        fix="rewrite that layer, or leave Core ML out with --runtime",
    )


def _drop_copies(exported: ExportedProgram) -> None:
    """Remove what only matters while torch runs: aliases, copies and assertions."""
    same = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.clone.default)
    for node in list(exported.graph.nodes):
        if node.op != "call_function":
            continue
        if "_assert" in str(node.target) or "sym_constrain" in str(node.target):
            exported.graph.erase_node(node)
        elif node.target in same and not any(user.op == "output" for user in node.users):
            node.replace_all_uses_with(node.args[0])
            exported.graph.erase_node(node)
    exported.graph_module.recompile()


def _new_ones(x: Tensor, size: Sequence[int], dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return torch.full(size, 1, dtype=dtype or x.dtype)


def _bitwise(integer: Callable[..., Tensor], logical: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """On masks the bitwise operators are the logical ones, which Core ML has; on integers they are not."""

    def rewrite(a: Tensor, b: Any) -> Tensor:
        if a.dtype == torch.bool and isinstance(b, torch.Tensor) and b.dtype == torch.bool:
            return logical(a, b)
        result: Tensor = NotImplemented
        return result

    return rewrite


def _index_copy(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """``x`` with rows replaced: one-hot rows pick the new ones, so that no scatter with repeated indices is needed."""
    size = x.shape[dim]
    picked = (torch.arange(size).unsqueeze(1) == index.unsqueeze(0)).to(x.dtype)
    moved, rows = x.movedim(dim, 0), source.movedim(dim, 0)
    new = (picked @ rows.reshape(index.shape[0], -1)).reshape(moved.shape)
    kept = 1 - picked.sum(1).reshape(-1, *[1] * (x.dim() - 1))
    return (moved * kept + new).movedim(0, dim)


REWRITES: dict[Any, Callable[..., Any]] = {
    aten.new_ones.default: _new_ones,
    aten.__and__.Tensor: _bitwise(torch.bitwise_and, torch.logical_and),
    aten.__or__.Tensor: _bitwise(torch.bitwise_or, torch.logical_or),
    aten.bitwise_and.Tensor: _bitwise(torch.bitwise_and, torch.logical_and),
    aten.bitwise_or.Tensor: _bitwise(torch.bitwise_or, torch.logical_or),
    aten.index_copy.default: _index_copy,
}
