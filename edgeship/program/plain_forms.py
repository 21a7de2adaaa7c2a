"""Operators whose meaning hangs on another tensor's shape, on memory or on a sign, written so that it does not.

Converters take these literally, refuse them, or get them wrong without a word; the normal form has none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from edgeship.program import expansions
from edgeship.program.folding import fetch
from edgeship.program.sampling import affine_grid, grid_sampler, sampled_plainly
from edgeship.program.spectra import keep_computed
from edgeship.program.windows import shared_out

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node


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
            _put_instead(module, node, full)


def _put_instead(module: GraphModule, node: Node, made: Node) -> None:
    """Let ``made`` stand where ``node`` stood, with all that is known of it."""
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)


def choose_by_constants(module: GraphModule) -> int:
    """Rows that a constant mask takes, or constant counts repeat, are chosen by their places. Returns how many changed.

    The number of rows is known then, which the operators do not say; who traces the graph again sees it.
    """
    import torch

    aten = torch.ops.aten
    masked = (aten.index.Tensor, aten._unsafe_index.Tensor)
    changed = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in masked and any(_constant_mask(module, index) is not None for index in node.args[1]):
            indices: list[Any] = []
            for index in node.args[1]:
                mask = _constant_mask(module, index)
                # A mask takes as many axes as it has.
                if mask is None:
                    indices.append(index)
                    continue
                with module.graph.inserting_before(node):
                    indices += [keep_computed(module, module.graph, place) for place in mask.nonzero(as_tuple=True)]
            node.args = (node.args[0], indices)
        elif node.target == aten.masked_select.default:
            mask = _constant_mask(module, node.args[1])
            sizes = node.args[0].meta["val"].shape
            if mask is None or not all(isinstance(size, int) for size in sizes):
                continue
            _choose_rows(module, node, mask.expand(sizes).flatten().nonzero().flatten(), None)
        elif node.target == aten.repeat_interleave.self_Tensor and node.args[1].op == "get_attr":
            repeats = fetch(module, str(node.args[1].target))
            axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
            _choose_rows(module, node, torch.repeat_interleave(repeats), axis)
        else:
            continue
        changed += 1
    return changed


def _constant_mask(module: GraphModule, index: Any) -> torch.Tensor | None:
    """The value of a mask that is a constant of the graph, any shape; else None."""
    import torch

    held = fetch(module, str(index.target)) if getattr(index, "op", "") == "get_attr" else None
    return held if isinstance(held, torch.Tensor) and held.dtype == torch.bool else None


def _choose_rows(module: GraphModule, node: Node, places: torch.Tensor, axis: int | None) -> None:
    """Put a choice of ``places`` [n] along ``axis`` (of all elements in order: None) where ``node`` is."""
    import torch

    aten = torch.ops.aten
    source = node.args[0]
    with module.graph.inserting_before(node):
        if axis is None:
            source, axis = module.graph.call_function(aten.reshape.default, (source, [-1])), 0
        index = keep_computed(module, module.graph, places)
        chosen = module.graph.call_function(aten.index_select.default, (source, axis, index))
    _put_instead(module, node, chosen)


def spell_out(module: GraphModule) -> None:
    """Write out what converters lack, or compute in a way that overflows.

    These are cosine similarity, the logarithm of a sigmoid, variance with mean, batch norms of the batch itself,
    padding with the other end, torchvision's ``roi_align``, and what stands in `expansions`.
    """
    import torch

    from edgeship.compat.torch import operator_named
    from edgeship.program.regions import torchvision_roi_align

    aten = torch.ops.aten
    table: dict[Any, Any] = {
        aten.cosine_similarity.default: _cosine_similarity,
        aten.log_sigmoid.default: _log_sigmoid,
        aten.var_mean.correction: _variance_and_mean,
        aten.var_mean.dim: _variance_and_mean_of,
        aten.cumprod.default: expansions.cumprod,
        aten.cummax.default: expansions.cummax,
        aten.cummin.default: expansions.cummin,
        aten.searchsorted.Tensor: expansions.searchsorted,
        aten.searchsorted.Scalar: expansions.searchsorted,
        aten.cdist.default: expansions.cdist,
        aten.rrelu.default: expansions.rrelu,
        torch.ops.higher_order.cond: expansions.either,
        aten.affine_grid_generator.default: affine_grid,
        aten.hardshrink.default: expansions.hardshrink,
        aten.kron.default: expansions.kron,
        aten.bilinear.default: expansions.bilinear,
        aten.col2im.default: expansions.fold,
        aten.embedding_bag.padding_idx: expansions.embedding_bag,
        aten.embedding_bag.default: expansions.embedding_bag,
        aten.hypot.default: expansions.hypot,
        aten.fmin.default: expansions.fmin,
        aten.fmax.default: expansions.fmax,
        aten.kthvalue.default: expansions.kthvalue,
        aten.median.dim: expansions.median,
        aten.median.default: expansions.median_of_all,
    }
    aligned = operator_named("torchvision::roi_align")
    if aligned is not None:
        table[aligned] = torchvision_roi_align
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in table:
            node.target = table[node.target]
        elif node.target == aten.lstm.input and _projects(node):
            node.target = expansions.projected_lstm
        elif node.target == aten.grid_sampler.default and sampled_plainly(node):
            node.target = grid_sampler
        elif node.target == aten.pad.default and "circular" in (*node.args[2:3], node.kwargs.get("mode")):
            node.target, node.args, node.kwargs = _round_the_edges, tuple(node.args[:2]), {}
        elif node.target == aten.batch_norm.default and (node.args[5] or node.args[3] is None):
            # Running statistics that are to be changed are refused before this.
            node.target, node.args = _norm_by_batch, (*node.args[:3], node.args[7])


def _projects(lstm: Node) -> bool:
    """Whether the hidden state, which is projected, has another size than the cell."""
    hidden, cell = cast("list[Node]", lstm.args[1])
    return bool(hidden.meta["val"].shape[-1] != cell.meta["val"].shape[-1])


def _cosine_similarity(x: torch.Tensor, y: torch.Tensor, dim: int = 1, eps: float = 1e-8) -> torch.Tensor:
    """``x`` and ``y`` of shapes that broadcast; ``dim`` goes."""
    import torch

    def normed(value: torch.Tensor) -> torch.Tensor:
        """Divided by the length along ``dim``."""
        return value / torch.clamp_min(torch.linalg.vector_norm(value, dim=dim, keepdim=True), eps)

    return (normed(x) * normed(y)).sum(dim)


def _round_the_edges(x: torch.Tensor, pads: list[int]) -> torch.Tensor:
    """``pad`` in circular mode: what comes before an axis is its end. ``pads`` begin with the last axis."""
    import torch

    for place in range(len(pads) // 2):
        axis, (before, after) = x.dim() - 1 - place, pads[2 * place : 2 * place + 2]
        size = x.shape[axis]
        parts = [x.narrow(axis, size - before, before), x, x.narrow(axis, 0, after)]
        x = torch.cat([part for part in parts if part.shape[axis]], axis)
    return x


def _log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Element by element."""
    import torch

    return torch.clamp_max(x, 0.0) - torch.log1p(torch.exp(-torch.abs(x)))


def _variance_and_mean(
    x: torch.Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Along ``dim``, or over all axes."""
    import torch

    axes = list(range(x.dim())) if dim is None else dim
    correction = 1 if correction is None else correction
    return torch.var(x, axes, correction=correction, keepdim=keepdim), x.mean(axes, keepdim=keepdim)


def _variance_and_mean_of(
    x: torch.Tensor, dim: Any, unbiased: bool = True, keepdim: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Along ``dim``."""
    return _variance_and_mean(x, dim, correction=int(unbiased), keepdim=keepdim)


def _norm_by_batch(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``x`` [N, C, ...], normalised by its own statistics; ``weight`` and ``bias`` [C]."""
    import torch

    axes = [axis for axis in range(x.dim()) if axis != 1]
    centred = x - x.mean(axes, keepdim=True)
    normed = centred * torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)
    shape = (-1, *[1] * (x.dim() - 2))
    normed = normed if weight is None else normed * weight.reshape(shape)
    return normed if bias is None else normed + bias.reshape(shape)


def choose_nearest(module: GraphModule) -> None:
    """A nearest resize by a ratio that is not a whole number becomes a choice of rows and columns.

    Each engine rounds its own way there; of whole ratios all make the same.
    """
    import torch
    from torch.nn import functional

    aten = torch.ops.aten
    modes = {
        aten.upsample_nearest1d.vec: "nearest",
        aten.upsample_nearest2d.vec: "nearest",
        aten.upsample_nearest3d.vec: "nearest",
        aten._upsample_nearest_exact1d.vec: "nearest-exact",
        aten._upsample_nearest_exact2d.vec: "nearest-exact",
        aten._upsample_nearest_exact3d.vec: "nearest-exact",
    }
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in modes:
            continue
        before, after = node.args[0].meta["val"].shape[2:], node.meta["val"].shape[2:]
        if all(int(size) % int(had) == 0 for size, had in zip(after, before, strict=True)):
            continue
        scales = node.args[2] if len(node.args) > 2 and node.args[2] is not None else [None] * len(before)
        found = node.args[0]
        for place, (had, size, scale) in enumerate(zip(before, after, scales, strict=True)):
            if had == size:
                continue
            counted = torch.arange(int(had), dtype=torch.float64).reshape(1, 1, -1)
            chosen = (
                functional.interpolate(counted, None if scale else int(size), scale, mode=modes[node.target])
                .long()
                .flatten()
            )
            with module.graph.inserting_before(node):
                index = keep_computed(module, module.graph, chosen)
                found = module.graph.call_function(aten.index_select.default, (found, place + 2, index))
        _put_instead(module, node, found)


def resize_as_products(module: GraphModule) -> None:
    """A resize that averages what it makes smaller becomes a product along each axis: few converters have it.

    What torch makes of the unit vectors of an axis is the matrix.
    """
    import torch

    aten = torch.ops.aten
    averaging = (aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec)
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in averaging:
            continue
        before, after = node.args[0].meta["val"].shape[2:], node.meta["val"].shape[2:]
        corners, scales = node.args[2], node.args[3] if len(node.args) > 3 else None
        matrices = []
        for axis, (had, size) in enumerate(zip(before, after, strict=True)):
            scale = None if scales is None else [scales[axis], 1.0]
            # Three columns alike: torch 2.13 reads an image of one column wrongly.
            units = torch.eye(int(had)).reshape(int(had), 1, int(had), 1).repeat(1, 1, 1, 3)
            made = node.target(units, [int(size), 3] if scale is None else None, corners, scale)
            # [had, 1, size, 3] -> [had, size]
            matrices.append(made[:, 0, :, 0])
        with module.graph.inserting_before(node):
            kept = [keep_computed(module, module.graph, matrix.contiguous()) for matrix in matrices]
            found = module.graph.call_function(shared_out, (node.args[0], kept))
        _put_instead(module, node, found)


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
        _put_instead(module, node, plain)


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
    """Negative indices counted from the front, element by element."""
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
    if name in ("argmax", "argmin", "argsort", "bucketize", "searchsorted", "abs", "relu", "bincount"):
        return True
    if name == "getitem":
        maker, place = node.args
        chosen = str(getattr(maker.target, "__name__", "")).split(".")[0] in ("topk", "sort", "max", "min")
        # Places come second; the values are those of what they were chosen from.
        return chosen and (place == 1 or _never_negative(module, maker.args[0], depth - 1))
    if name in ("clamp", "clamp_min", "remainder") and len(node.args) > 1 and isinstance(node.args[1], (int, float)):
        return bool(node.args[1] >= 0)
    same = (
        "add", "mul", "view", "reshape", "unsqueeze", "squeeze", "expand", "permute", "transpose", "slice", "select",
        "floor_divide", "clone", "to", "_to_copy", "cumsum", "flatten", "repeat", "cat", "minimum", "where", "div",
    )  # fmt: skip
    plain = node.kwargs.get("rounding_mode", "floor") in ("floor", "trunc") and node.kwargs.get("alpha", 1) >= 0
    if name not in same or not plain:
        return False
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        return True
    first = node.args[0]
    inputs: list[Any] = list(first) if isinstance(first, (list, tuple)) else [first]
    if name in ("add", "mul", "floor_divide", "div", "minimum", "where"):
        inputs = list(node.args[1:] if name == "where" else node.args)
    return all(_never_negative(module, item, depth - 1) for item in inputs)
