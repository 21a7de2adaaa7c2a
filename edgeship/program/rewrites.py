"""Rewrites of the normal form that more than one runtime needs. Each keeps the program's answers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from edgeship.program.inventory import take_inventory

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Graph, Node

    from edgeship.program.program import TorchProgram

# What an additive mask adds, by the bits of the grid that scores and mask share. -inf has no integer; exp(-100) is 0 in
# every format, and exp(-25) leaves 8-bit scores a step four times finer.
MASKED = {16: -100.0, 8: -25.0}
# Numbers this low, where they reach a softmax through a mask, mean "never".
NEVER = -9999.0


def for_static_activations(program: TorchProgram, bits: int = 16) -> TorchProgram:
    """The program in the form whose every tensor can carry a static integer grid of ``bits``.

    Attention is spelled out (its scores and probabilities need grids of their own), masks are finite, ``silu`` is
    ``x * sigmoid(x)``, ``rsqrt`` is a division and 16-bit clips are minima and maxima: 16-bit reciprocals and clips are
    silently wrong on Hexagon.
    """
    from edgeship.compat.torch import decomposed, replaced

    exported = replaced(
        program.exported,
        graph_module=copy.deepcopy(program.exported.graph_module),
        graph_signature=copy.deepcopy(program.exported.graph_signature),
    )
    weights = dict(program.weights)
    graph = exported.graph_module.graph
    index_as_view(exported)
    masked = MASKED[bits]
    for name in finite_masks(exported, masked):
        key = exported.graph_signature.inputs_to_buffers[name]
        weights[key] = weights[key].clamp(min=masked)
        exported = replaced(exported, state_dict={**exported.state_dict, key: weights[key]})
    drop_idle_masks(exported)
    divide_by_roots(graph)
    reshape_freely(graph)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()
    exported = decomposed(exported, _static_forms(bits))
    reshape_freely(exported.graph_module.graph)
    exported.graph_module.recompile()
    record = dataclasses.replace(program.record, inventory=take_inventory(exported))
    return dataclasses.replace(program, held=exported, weights=weights, record=record)


def _static_forms(bits: int) -> dict[Any, Callable[..., Any]]:
    import torch

    aten = torch.ops.aten
    masked = MASKED[bits]

    def silu(x: torch.Tensor) -> torch.Tensor:
        """Element by element."""
        return x * torch.sigmoid(x)

    def reciprocal(x: torch.Tensor) -> torch.Tensor:
        """Element by element."""
        return torch.ones((), dtype=x.dtype) / x

    def between(x: torch.Tensor, low: float | None = None, high: float | None = None) -> torch.Tensor:
        """``x`` cut to ``low..high``, element by element."""
        if low is not None:
            x = torch.relu(x) if low == 0 else torch.maximum(x, torch.full((1,), float(low), dtype=x.dtype))
        return x if high is None else torch.minimum(x, torch.full((1,), float(high), dtype=x.dtype))

    def hardtanh(x: torch.Tensor, low: float = -1.0, high: float = 1.0) -> torch.Tensor:
        """Element by element."""
        return between(x, low, high)

    # A 16-bit Clip does nothing on Hexagon, silently (onnxruntime-qnn 2.7.0); 8-bit ones vanish in their own grid.
    clips: dict[Any, Callable[..., Any]] = {
        aten.relu6.default: functools.partial(between, low=0.0, high=6.0),
        aten.hardtanh.default: hardtanh,
        aten.clamp.default: between,
    }
    return {
        **(clips if bits == 16 else {}),
        aten.scaled_dot_product_attention.default: functools.partial(spelled_out_attention, masked=masked),
        aten.silu.default: silu,
        aten.reciprocal.default: reciprocal,
    }


def spelled_out_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    masked: float = MASKED[16],
) -> torch.Tensor:
    """``scaled_dot_product_attention`` in products and a softmax, with a finite mask.

    Query (B, H, T, D), key and value (B, H or KV heads, S, D). The query is scaled rather than the scores: T x D
    products instead of T x S. A row that masks everything averages the values, where torch's own answers NaN.
    """
    import torch

    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query if scale == 1.0 else query * scale, key.transpose(-2, -1))
    if is_causal:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        scores = scores + torch.zeros(seen.shape).masked_fill(~seen, masked)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, masked)
        scores = scores + attn_mask
    return torch.matmul(torch.softmax(scores, -1), value)


def reshape_freely(graph: Graph) -> None:
    """Views become reshapes and copies go: a view depends on strides, which change when what feeds it does."""
    import torch

    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        elif node.target in (aten.clone.default, aten.contiguous.default):
            node.replace_all_uses_with(cast("Node", node.args[0]))
            graph.erase_node(node)


def drop_idle_masks(program: ExportedProgram) -> int:
    """Attention with a constant mask that hides nothing reads no mask. Returns how many."""
    import torch

    changed = 0
    for node in program.graph.nodes:
        if node.target != torch.ops.aten.scaled_dot_product_attention.default or len(node.args) < 4:
            continue
        mask = _constant(program, node.args[3])
        if mask is not None and mask.dtype == torch.bool and bool(mask.all()):
            node.args = (*node.args[:3], None, *node.args[4:])
            changed += 1
    return changed


def divide_by_roots(graph: Graph) -> int:
    """``x * rsqrt(y)`` becomes ``x / sqrt(y)``. Returns how many roots changed."""
    import torch

    aten = torch.ops.aten
    changed = 0
    for root in [node for node in graph.nodes if node.target == aten.rsqrt.default]:
        users = list(root.users)
        if not all(user.target == aten.mul.Tensor for user in users):
            continue
        with graph.inserting_before(root):
            plain = graph.call_function(aten.sqrt.default, (root.args[0],))
        plain.meta = dict(root.meta)
        for user in users:
            other = user.args[0] if user.args[1] is root else user.args[1]
            if other is root:
                continue
            user.target = aten.div.Tensor
            user.args = (other, plain)
        changed += 1
    return changed


def index_as_view(program: ExportedProgram) -> int:
    """Indexing by constants that only moves axes becomes a view, and ``and`` with an all-true constant an expansion.

    Transformers' masks are made so; no NPU has boolean gathers. Returns how many nodes changed.
    """
    import torch

    aten = torch.ops.aten
    graph = program.graph_module.graph
    changed = 0
    for node in list(graph.nodes):
        if node.target == aten.index.Tensor:
            indices = [None if index is None else _constant(program, index) for index in node.args[1]]
            if any(have is None and given is not None for have, given in zip(indices, node.args[1], strict=True)):
                continue
            source = node.args[0].meta["val"]
            places = torch.arange(source.numel()).reshape(source.shape)
            moved = torch.ops.aten.index.Tensor(places, indices)
            if moved.numel() != places.numel() or not torch.equal(moved.flatten(), places.flatten()):
                continue
            target, args = aten.reshape.default, (node.args[0], list(moved.shape))
        elif node.target in (aten.__and__.Tensor, aten.logical_and.default, aten.bitwise_and.Tensor):
            sides = [(_constant(program, arg), other) for arg, other in (node.args[:2], node.args[1::-1])]
            kept = next((other for value, other in sides if value is not None and bool(value.all())), None)
            if kept is None or kept.meta["val"].dtype != torch.bool:
                continue
            target, args = aten.expand.default, (kept, list(node.meta["val"].shape))
        else:
            continue
        with graph.inserting_before(node):
            plain = graph.call_function(target, args)
        plain.meta = dict(node.meta)
        node.replace_all_uses_with(plain)
        graph.erase_node(node)
        changed += 1
    return changed


def _constant(program: ExportedProgram, node: Any) -> torch.Tensor | None:
    """The value of a small integer or boolean buffer. Any shape."""
    name = program.graph_signature.inputs_to_buffers.get(getattr(node, "name", ""))
    value = None if name is None else program.state_dict.get(name)
    if value is None and name is not None:
        value = cast("torch.Tensor | None", program.constants.get(name))
    return None if value is None or value.is_floating_point() else value


def finite_masks(program: ExportedProgram, masked: float = MASKED[16]) -> list[str]:
    """Give masks the value ``masked`` in place of -inf or the lowest float; returns the buffers that need it too.

    Only numbers that reach a softmax through the adding, selecting and reshaping that masks are made of are touched.
    """
    changed: list[str] = []
    for node in _mask_nodes(program.graph_module.graph):
        if node.op == "placeholder":
            if node.name in program.graph_signature.inputs_to_buffers:
                changed.append(node.name)
            continue
        node.args = tuple(_finite(arg, masked) for arg in node.args)
        node.kwargs = {key: _finite(arg, masked) for key, arg in node.kwargs.items()}
    return changed


def _finite(arg: Any, masked: float) -> Any:
    return masked if isinstance(arg, float) and arg <= NEVER else arg


def _mask_nodes(graph: Graph) -> list[Node]:
    """Float nodes from which a mask is made, upstream of every softmax."""
    import torch

    making = {
        "add", "sub", "rsub", "mul", "where", "masked_fill", "expand", "view", "reshape", "unsqueeze", "squeeze",
        "slice", "select", "permute", "transpose", "cat", "index", "_to_copy", "to", "full", "full_like", "clamp",
        "zeros_like", "maximum", "minimum", "lift_fresh_copy", "scalar_tensor",
    }  # fmt: skip
    aten = torch.ops.aten
    waiting: list[Node] = []
    for node in graph.nodes:
        if node.target == aten.scaled_dot_product_attention.default and len(node.args) > 3 and node.args[3] is not None:
            waiting.append(node.args[3])
        elif node.target in (aten.softmax.int, aten._softmax.default):
            waiting.append(node.args[0])
    found: dict[Node, None] = {}
    while waiting:
        node = waiting.pop()
        value = node.meta.get("val")
        if node in found or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        if node.op == "placeholder" or str(getattr(node.target, "__name__", "")).split(".")[0] in making:
            found[node] = None
            waiting += node.all_input_nodes
    return list(found)
