"""Rewrite a graph into the operators that one converter has.

A *rewrite* is a function of torch operators, traced in the place of the operator that it stands for, so that shapes and
dtypes stay right. It returns ``NotImplemented`` to leave an operator as it is. The rewrites here serve more than one
converter; each converter has a table of its own. What is in no table is decomposed by torch's own rules.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._decomp import decomposition_table
from torch.nn import functional

from edgeship.errors import UnsupportedOpError
from edgeship.program.provenance import where

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import Node

aten = torch.ops.aten
Rewrite = Callable[..., Any]

# Rewrites and torch's rules may bring in operators that need rewriting themselves.
MAX_ROUNDS = 4
MAX_UNROLLED = 64


def rewritten(
    exported: ExportedProgram,
    known: Callable[[Node], bool],
    rewrites: Mapping[Any, Rewrite],
    title: str,
    base: Mapping[Any, Rewrite] | None = None,
) -> ExportedProgram:
    """The program in operators that a converter knows.

    Args:
        exported: not changed.
        known: whether the converter has the operator of a node.
        rewrites: what is rewritten even where the converter has the operator.
        title: the runtime's name, for the error.
        base: the decompositions that the converter asks for itself.

    Raises:
        UnsupportedOpError: an operator that is not known, and that neither the table nor torch decomposes.
    """
    defaults = torch.export.default_decompositions()
    table: dict[Any, Rewrite] = {**(base or {}), **rewrites}
    for number in range(MAX_ROUNDS):
        if number:
            loosen_views(exported)
        exported = exported.run_decompositions(dict(table))
        drop_copies(exported)
        lacking = [node for node in exported.graph.nodes if node.op == "call_function" and not known(node)]
        if not lacking:
            return exported
        for node in lacking:
            rule = decomposition_table.get(node.target) or defaults.get(node.target)
            if rule is None or node.target in rewrites:
                raise _unsupported(node, title)
            table[node.target] = rule
    raise _unsupported(lacking[0], title)


def _unsupported(node: Node, title: str) -> UnsupportedOpError:
    written = node.meta.get("original_aten", node.target)
    return UnsupportedOpError(
        f"{title}'s converter has no lowering for {written} at {where(node)}",
        fix=f"rewrite that layer, or leave {title} out with --runtime",
    )


def drop_copies(exported: ExportedProgram) -> None:
    """Remove what only matters while torch runs: aliases, copies and assertions. Outputs keep their own copy."""
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


def loosen_views(exported: ExportedProgram) -> None:
    """Views become reshapes, which are traced anew: a copy that made their memory contiguous may be gone."""
    for node in exported.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    exported.graph_module.recompile()


def separate_outputs(exported: ExportedProgram) -> None:
    """Give every output that is an input, a weight or another output a node of its own: itself times one."""
    output = exported.graph.output_node()
    seen: set[Node] = set()
    results = []
    for place, result in enumerate(output.args[0]):
        if result in seen or result.op != "call_function":
            value = result.meta["val"]
            with exported.graph.inserting_before(output):
                result = exported.graph.call_function(aten.mul.Tensor, (result, 1))
            result.meta["val"] = value
            exported.graph_signature.output_specs[place].arg.name = result.name
        seen.add(result)
        results.append(result)
    output.args = (tuple(results),)
    exported.graph_module.recompile()


def new_ones(x: Tensor, size: Sequence[int], dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """``new_ones`` as a filled tensor."""
    return torch.full(size, 1, dtype=dtype or x.dtype)


def on_masks(logical: Callable[..., Tensor]) -> Rewrite:
    """A bitwise operator as the ``logical`` one where both sides are masks; on integers they differ."""

    def rewrite(a: Tensor, b: Any) -> Any:
        masks = a.dtype == torch.bool and isinstance(b, torch.Tensor) and b.dtype == torch.bool
        return logical(a, b) if masks else NotImplemented

    return rewrite


def index_copy(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """``x`` with rows replaced: one-hot rows pick the new ones, so that no scatter with repeated indices is needed."""
    size = x.shape[dim]
    picked = (torch.arange(size).unsqueeze(1) == index.unsqueeze(0)).to(x.dtype)
    moved, rows = x.movedim(dim, 0), source.movedim(dim, 0)
    new = (picked @ rows.reshape(index.shape[0], -1)).reshape(moved.shape)
    kept = 1 - picked.sum(1).reshape(-1, *[1] * (x.dim() - 1))
    return (moved * kept + new).movedim(0, dim)


def product(x: Tensor, dim: int, keepdim: bool = False, dtype: torch.dtype | None = None) -> Any:
    """A product along a short axis, written out."""
    if x.shape[dim] > MAX_UNROLLED:
        return NotImplemented
    parts = torch.split(x if dtype is None else x.to(dtype), 1, dim)
    result = functools.reduce(operator.mul, parts)
    return result if keepdim else result.squeeze(dim)


def variance(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    """``var.correction`` as the mean of squared distances from the mean."""
    axes = list(range(x.dim())) if dim is None else list(dim)
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    square = (x - x.mean(axes, keepdim=True)).square().mean(axes, keepdim=keepdim)
    return square * (count / (count - (1 if correction is None else correction)))


def remainder(x: Tensor, divisor: float) -> Tensor:
    """``remainder.Scalar``, with the sign of the divisor."""
    return x - torch.div(x, divisor, rounding_mode="floor") * divisor


def average_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Any:
    """``avg_pool2d`` whose windows all count alike: what stands at the edges is padded, averaged and scaled back.

    Left alone when every window is whole and counts its padding.
    """
    pads = list(padding) * (2 // len(padding))
    steps = list(stride) or list(kernel)
    if not ceil_mode and (count_include_pad or divisor or not any(pads)):
        return NotImplemented
    sizes = list(x.shape[-2:])
    extra = [_overhang(*numbers) if ceil_mode else 0 for numbers in zip(sizes, kernel, steps, pads, strict=True)]
    edges = [pads[1], pads[1] + extra[1], pads[0], pads[0] + extra[0]]
    means = functional.avg_pool2d(functional.pad(x, edges), list(kernel), steps)
    area = kernel[0] * kernel[1]
    if divisor:
        return means * (area / divisor)
    if count_include_pad:
        counted = torch.ones([1, 1, *(size + 2 * pad for size, pad in zip(sizes, pads, strict=True))], dtype=x.dtype)
        counted = functional.pad(counted, [0, extra[1], 0, extra[0]])
    else:
        counted = functional.pad(torch.ones([1, 1, *sizes], dtype=x.dtype), edges)
    return means / functional.avg_pool2d(counted, list(kernel), steps)


def _overhang(size: int, kernel: int, stride: int, pad: int) -> int:
    """How far the last window reaches past the padding; torch drops windows that start past the input."""
    count = -(-(size + 2 * pad - kernel) // stride) + 1
    if (count - 1) * stride >= size + pad:
        count -= 1
    return max((count - 1) * stride + kernel - size - 2 * pad, 0)


def ordered(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """``sort`` as ``topk`` of everything."""
    values, indices = torch.topk(x, x.shape[dim], dim, largest=descending)
    return values, indices
