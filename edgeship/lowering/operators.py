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
from torch.nn import functional

from edgeship.compat.torch import decomposition_of, replaced
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
            rule = decomposition_of(node.target) or defaults.get(node.target)
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


def _one_an_axis(given: Sequence[int], rank: int) -> list[int]:
    """``given``, or its only number for every axis."""
    numbers = [int(number) for number in given]
    return numbers * rank if len(numbers) == 1 else numbers


def transposed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
    dilation: Sequence[int] = (1,),
    *,
    grouped: bool = False,
    dilated: bool = False,
) -> Tensor:
    """A transposed convolution as a whole one, whose edges are cut off or filled up.

    A dilated one spreads its input with zeros, and is a plain convolution with the kernel turned round.

    Args:
        grouped, dilated: whether the runtime has that; else groups are convolved one by one.
    """
    rank = weight.dim() - 2
    stride, padding = _one_an_axis(stride, rank), _one_an_axis(padding, rank)
    output_padding, dilation = _one_an_axis(output_padding, rank), _one_an_axis(dilation, rank)
    # Lengths by axis of space: of the result before its edges are cut, and after.
    whole: list[int] = []
    wanted: list[int] = []
    for axis in range(rank):
        reach = dilation[axis] * (weight.shape[axis + 2] - 1) + 1
        whole.append((x.shape[axis + 2] - 1) * stride[axis] + reach)
        wanted.append(whole[axis] - 2 * padding[axis] + output_padding[axis])
    fills = any(padding[axis] + wanted[axis] > whole[axis] for axis in range(rank))
    # What is filled up holds the bias too, so there it is added last.
    early = None if fills else bias
    # Without dilation, or with a runtime that has it, nothing has to be spread.
    plain = dilated or all(step == 1 for step in dilation)
    if (grouped or groups == 1) and plain:
        function = functional.conv_transpose1d if rank == 1 else functional.conv_transpose2d
        made = function(x, weight, early, stride, groups=groups, dilation=dilation)
    else:
        made = _by_groups(x, weight, stride, dilation, groups, plain)
        early = None
    for place in range(rank):
        axis = place + 2
        kept = min(wanted[place], whole[place] - padding[place])
        if padding[place] or kept < whole[place]:
            made = made.narrow(axis, padding[place], kept)
        if wanted[place] > kept:
            made = functional.pad(made, [0, 0] * (rank - 1 - place) + [0, wanted[place] - kept])
    return made if bias is None or early is not None else made + bias.reshape(-1, *[1] * rank)


def _by_groups(
    x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int, plain: bool
) -> Tensor:
    rank = weight.dim() - 2
    function = functional.conv_transpose1d if rank == 1 else functional.conv_transpose2d
    made = []
    # On three axes: a converter that lays images channels last would turn the slices of a weight too.
    flat, width = weight.flatten(2), x.shape[1] // groups
    for group in range(groups):
        part, rows = (given.narrow(axis, group * width, width) for given, axis in ((x, 1), (flat, 0)))
        kernel = (*rows.shape[:2], *weight.shape[2:])
        if plain:
            made.append(function(part, rows.reshape(kernel), stride=list(stride)))
        else:
            # [in, out, k] -> [out, in, k], from the last to the first
            turned = rows.transpose(0, 1).flip(2).reshape(kernel[1], kernel[0], *kernel[2:])
            made.append(_spread_convolution(part, turned, stride, dilation))
    return made[0] if groups == 1 else torch.cat(made, 1)


def _spread_convolution(x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    rank = weight.dim() - 2
    for place, step in enumerate(stride):
        axis, size = place + 2, x.shape[place + 2]
        # [..., size, ...] -> [..., size, step, ...] -> [..., size * step, ...], the last zeros cut off
        wide = functional.pad(x.unsqueeze(axis + 1), [0, 0] * (rank - 1 - place) + [0, step - 1])
        x = wide.flatten(axis, axis + 1).narrow(axis, 0, (size - 1) * step + 1)
    edges = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
    plain = functional.conv1d if rank == 1 else functional.conv2d
    return plain(x, weight, padding=edges, dilation=list(dilation))


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

    ``x`` [N, C, ...space].
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
