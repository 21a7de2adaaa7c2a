"""Operators whose meaning hangs on another tensor's shape, on memory or on a sign, written so that it does not.

Converters take these literally, refuse them, or get them wrong without a word; the normal form has none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeship.program.folding import fetch
from edgeship.program.spectra import keep_computed

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, GraphModule


def fill_plainly(module: GraphModule) -> None:
    """``new_zeros(x, shape)`` and its like read no value of ``x``: they become ``full``, and fold. So do fills with a
    constant of one number."""
    import torch

    aten = torch.ops.aten
    zeros = (aten.new_zeros.default, aten.zeros_like.default, aten.new_empty.default, aten.empty_like.default)
    values: dict[Any, float | None] = {
        **dict.fromkeys(zeros, 0),
        **dict.fromkeys((aten.new_ones.default, aten.ones_like.default), 1),
        **dict.fromkeys((aten.new_full.default, aten.full_like.default), None),
    }
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in (aten.fill_.Tensor, aten.fill.Tensor) and node.args[1].op == "get_attr":
            held = fetch(module, str(node.args[1].target))
            node.target = aten.fill_.Scalar if node.target == aten.fill_.Tensor else aten.fill.Scalar
            node.args = (node.args[0], held.item())
        elif node.target in values:
            made = node.meta["val"]
            given = values[node.target]
            value = node.args[-1] if given is None else given
            if not isinstance(value, (int, float, bool)):
                continue
            value = bool(value) if made.dtype == torch.bool else value
            with module.graph.inserting_before(node):
                full = module.graph.call_function(
                    aten.full.default, ([int(size) for size in made.shape], value), {"dtype": made.dtype}
                )
            full.meta = dict(node.meta)
            node.replace_all_uses_with(full)
            module.graph.erase_node(node)


def pool_plainly(graph: Graph) -> None:
    """A pool to one number is a mean: torch's own rules look at how the input lies in memory."""
    import torch

    aten = torch.ops.aten
    pools = (aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool3d.default)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in pools and all(size == 1 for size in node.args[1]):
            axes = list(range(-len(node.args[1]), 0))
            with graph.inserting_before(node):
                mean = graph.call_function(aten.mean.dim, (node.args[0], axes, True))
            mean.meta = dict(node.meta)
            node.replace_all_uses_with(mean)
            graph.erase_node(node)


def strides_as_indices(module: GraphModule) -> None:
    """``as_strided`` becomes a choice of elements, a reshape where it takes all of them in order."""
    import torch

    aten = torch.ops.aten
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in (aten.as_strided.default, aten.as_strided_copy.default):
            continue
        source = node.args[0].meta["val"]
        if source.storage_offset():
            continue
        offset = int(node.args[3]) if len(node.args) > 3 and node.args[3] is not None else 0
        # Where each element of memory stands in the tensor, read as the operator reads memory.
        memory = torch.empty_strided(source.shape, source.stride(), dtype=torch.int64)
        memory.copy_(torch.arange(source.numel()).reshape(source.shape))
        places = memory.as_strided(node.args[1], node.args[2], offset).contiguous()
        shape = [int(size) for size in node.args[1]]
        with module.graph.inserting_before(node):
            flat = module.graph.call_function(aten.reshape.default, (node.args[0], [-1]))
            whole = places.numel() == source.numel() and torch.equal(places.flatten(), torch.arange(source.numel()))
            if not whole:
                index = keep_computed(module, module.graph, places.flatten())
                flat = module.graph.call_function(aten.index_select.default, (flat, 0, index))
            plain = module.graph.call_function(aten.reshape.default, (flat, shape))
        plain.meta = dict(node.meta)
        node.replace_all_uses_with(plain)
        module.graph.erase_node(node)


def count_from_start(module: GraphModule) -> int:
    """Indices that arrive at run time count from the start: -1 is the last. Returns how many changed.

    Only ``index``, ``index_put`` and ``take`` count from the end; other operators refuse what is negative.
    """
    import torch

    aten = torch.ops.aten
    puts = (aten.index_put.default, aten.index_put_.default, aten._unsafe_index_put.default)
    changed = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in (aten.index.Tensor, aten._unsafe_index.Tensor, *puts):
            continue
        sizes = node.args[0].meta["val"].shape
        indices = list(node.args[1])
        made = [index if index is None else index.meta.get("val") for index in indices]
        # A mask takes as many axes as it has; what follows it is not looked at.
        if any(isinstance(value, torch.Tensor) and value.dtype == torch.bool for value in made):
            continue
        for axis, index in enumerate(indices):
            if index is None or _never_negative(module, index):
                continue
            with module.graph.inserting_before(node):
                indices[axis] = module.graph.call_function(_from_start, (index, int(sizes[axis])))
            indices[axis].meta = dict(index.meta)
            changed += 1
        node.args = (node.args[0], indices, *node.args[2:])
    return changed


def _from_start(index: torch.Tensor, size: int) -> torch.Tensor:
    import torch

    return torch.where(index < 0, index + size, index)


def _never_negative(module: GraphModule, node: Any, depth: int = 8) -> bool:
    """Whether integers are 0 or more, as far as the operators that made them show."""
    import torch

    if isinstance(node, (int, float)):
        return node >= 0
    if node.op == "get_attr":
        held = fetch(module, str(node.target))
        return isinstance(held, torch.Tensor) and bool((held >= 0).all())
    if node.op != "call_function" or depth == 0:
        return False
    name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
    if name in ("argmax", "argmin", "argsort", "bucketize", "searchsorted", "bitwise_not", "abs", "relu", "bincount"):
        return True
    if name == "getitem":
        return str(getattr(node.args[0].target, "__name__", "")).split(".")[0] in ("topk", "sort", "max", "min")
    if name == "clamp" and len(node.args) > 1 and isinstance(node.args[1], (int, float)):
        return bool(node.args[1] >= 0)
    if name in ("clamp_min", "remainder") and isinstance(node.args[1], (int, float)):
        return bool(node.args[1] >= 0)
    same = (
        "add", "mul", "view", "reshape", "unsqueeze", "squeeze", "expand", "permute", "transpose", "slice", "select",
        "floor_divide", "clone", "to", "_to_copy", "cumsum", "flatten", "repeat", "cat", "minimum", "where", "div",
    )  # fmt: skip
    if name not in same or node.kwargs.get("rounding_mode", "floor") not in ("floor", "trunc"):
        return False
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        return True
    first = node.args[0]
    inputs: list[Any] = list(first) if isinstance(first, (list, tuple)) else [first]
    if name in ("add", "mul", "floor_divide", "div", "minimum", "where"):
        inputs = list(node.args[1:] if name == "where" else node.args)
    return all(_never_negative(module, item, depth - 1) for item in inputs)
