"""Rewrite a graph into the operators that one converter has.

A *rewrite* is a function of torch operators, traced in the place of the operator that it stands for, so that shapes and
dtypes stay right. It returns ``NotImplemented`` to leave an operator as it is. The rewrites here serve more than one
converter; each converter has a table of its own. What is in no table is decomposed by torch's own rules.
"""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from edgeship.compat.torch import decomposed, decomposition_of, replaced
from edgeship.errors import UnsupportedOpError
from edgeship.program.provenance import where

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import Graph, Node

aten = torch.ops.aten
Rewrite = Callable[..., Any]

# Rewrites and torch's rules may bring in operators that need rewriting themselves.
MAX_ROUNDS = 4
MAX_UNROLLED = 64
MAX_ONE_HOT = 1 << 24


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
    # Made when the first rule is wanted of it: that takes as long as tracing a small network.
    defaults = functools.cache(torch.export.default_decompositions)
    table: dict[Any, Rewrite] = {**(base or {}), **rewrites}
    for number in range(MAX_ROUNDS):
        if number:
            loosen_views(exported)
        exported = decomposed(exported, table)
        drop_copies(exported)
        lacking = [node for node in exported.graph.nodes if node.op == "call_function" and not known(node)]
        if not lacking:
            return exported
        for node in lacking:
            rule = decomposition_of(node.target) or defaults().get(node.target)
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
    """``new_ones`` as a filled tensor. ``size`` is the shape."""
    return torch.full(size, 1, dtype=dtype or x.dtype)


def on_masks(logical: Callable[..., Tensor]) -> Rewrite:
    """A bitwise operator as the ``logical`` one where both sides are masks; on integers they differ.

    Element by element.
    """

    def rewrite(a: Tensor, b: Any) -> Any:
        """Element by element."""
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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear`` as a product of two matrices.

    Torch's own rule repeats the weight along the other axes where ``x`` is not contiguous, behind a permute say.
    """
    if x.dim() == 2 and bias is not None:
        return torch.addmm(bias, x, weight.t())
    # [..., in] -> [rows, in]
    rows = x.reshape(-1, x.shape[-1])
    found = torch.mm(rows, weight.t())
    found = found.reshape(*x.shape[:-1], weight.shape[0])
    return found if bias is None else found + bias


def index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """``index_put`` that adds: each row of ``x`` that is named gets the sum of the values that name it.

    One-hot rows pick and sum them, for tables of up to `MAX_ONE_HOT` entries.
    """
    if not accumulate or any(index is None or index.dtype == torch.bool for index in indices):
        return NotImplemented
    named = [index for index in indices if index is not None]
    whole = functools.reduce(operator.add, (torch.zeros_like(index) for index in named)).shape
    given = [index.expand(whole) for index in named]
    sizes = x.shape[: len(given)]
    rest = x.shape[len(given) :]
    place = torch.zeros_like(given[0])
    for index, size in zip(given, sizes, strict=True):
        place = place * size + index
    rows, count = math.prod(sizes), place.numel()
    if rows * count > MAX_ONE_HOT:
        return NotImplemented
    # [rows, count], then [rows, count] x [count, rest]
    # One row of zeros and ones for each place of the result.
    picked = (torch.arange(rows).unsqueeze(1) == place.reshape(1, -1)).to(x.dtype)
    wide = values.expand(*given[0].shape, *rest).reshape(count, -1)
    return x + (picked @ wide).reshape(x.shape)


def scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    """``scatter_add``: each place along ``dim`` gets the sum of the values that name it, by zeros and ones."""
    moved, places = x.movedim(dim, -1), index.movedim(dim, -1)
    values = source[tuple(slice(size) for size in index.shape)].movedim(dim, -1)
    size = moved.shape[-1]
    if places.numel() * size > MAX_ONE_HOT or places.shape[:-1] != moved.shape[:-1]:
        return NotImplemented
    # [..., count, size], then [..., 1, count] x [..., count, size]
    named = (places.unsqueeze(-1) == torch.arange(size)).to(x.dtype)
    added = torch.matmul(values.unsqueeze(-2), named).squeeze(-2)
    return (moved + added).movedim(-1, dim)


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
    """``var.correction`` as the mean of squared distances from the mean. Along ``dim``, or over all axes."""
    axes = list(range(x.dim())) if dim is None else list(dim)
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    square = (x - x.mean(axes, keepdim=True)).square().mean(axes, keepdim=keepdim)
    return square * (count / (count - (1 if correction is None else correction)))


def remainder(x: Tensor, divisor: float) -> Tensor:
    """``remainder.Scalar``, with the sign of the divisor."""
    return x - torch.div(x, divisor, rounding_mode="floor") * divisor


def ordered(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """``sort`` as ``topk`` of everything. Along ``dim``."""
    values, indices = torch.topk(x, x.shape[dim], dim, largest=descending)
    return values, indices


def stable_top(x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """``sort.stable`` as ``topk`` of everything, which engines compute with equal elements in their order."""
    return ordered(x, dim, descending)


def with_short_sorts(exported: ExportedProgram) -> ExportedProgram:
    """The program with each stable sort of which only the start is read as a ``topk`` of that; itself without any."""
    if not any(node.target == aten.sort.stable for node in exported.graph.nodes):
        return exported
    made = replaced(
        exported,
        graph_module=copy.deepcopy(exported.graph_module),
        graph_signature=copy.deepcopy(exported.graph_signature),
    )
    shorten_sorts(made.graph)
    made.graph_module.recompile()
    return made


def shorten_sorts(graph: Graph) -> None:
    """Make each stable sort a ``topk`` of as many as are read; equal elements keep their order, as engines have it."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target != aten.sort.stable:
            continue
        x, value = node.args[0], node.args[0].meta["val"]
        dim = node.kwargs.get("dim", -1) % max(value.dim(), 1)
        count = max((_read(part, dim, value.shape[dim]) for part in node.users), default=1)
        with graph.inserting_before(node):
            top = graph.call_function(aten.topk.default, (x, count, dim, bool(node.kwargs.get("descending")), True))
        made = [item.narrow(dim, 0, count) for item in node.meta["val"]]
        top.meta = {**node.meta, "val": tuple(made)}
        for part in node.users:
            part.meta["val"] = made[int(part.args[1])]
        node.replace_all_uses_with(top)
        graph.erase_node(node)
    graph.lint()


def _read(part: Node, dim: int, size: int) -> int:
    """How many elements of one result of a sort are read, from the first on."""
    ends = []
    for user in part.users:
        start_only = user.target == aten.slice.Tensor and user.args[1] == dim and user.args[2] in (0, None)
        end: Any = user.args[3] if start_only and len(user.args) == 4 else size
        ends.append(min(int(end), size))
    return max(ends, default=1)
