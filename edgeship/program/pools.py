"""Pools that converters lack, or read in ways of their own, in operators that all of them have.

A maximum over windows goes axis by axis, as the largest of a few choices of rows: what a window lacks at an edge is one
of its own rows again, which changes no maximum. A mean over windows of unequal size is a product with their shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgeship.program.spectra import keep_computed
from edgeship.program.windows import (
    adaptive_windows,
    divided_pool,
    largest_and_where,
    largest_of,
    max_windows,
    shared_out,
    window_shares,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node


def pool_plainly(module: GraphModule) -> None:
    """Write adaptive pools as plain ones, products or choices, means to one number as means, and places as choices."""
    import torch

    aten = torch.ops.aten
    means = (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)
    largest = (aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
    placed = (
        aten.max_pool1d_with_indices.default,
        aten.max_pool2d_with_indices.default,
        aten.max_pool3d_with_indices.default,
    )
    plain = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
    averages = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in (*averages, *plain, *placed):
            _tell_stride(node)
        if node.target in means:
            _plain_mean(module, node)
        elif node.target in largest:
            _adaptive_maximum(module, node)
        elif node.target in placed:
            _placed_maximum(module, node)
        elif node.target in averages and len(node.args) > DIVISOR and node.args[DIVISOR]:
            # One converter leaves the divisor out and another refuses it.
            node.target = divided_pool


def _tell_stride(node: Node) -> None:
    """The stride that a pool leaves out is its kernel: one converter takes it for none where windows have holes."""
    if len(node.args) < 3 or not node.args[2]:
        node.args = (*node.args[:2], node.args[1], *node.args[3:])


# Where an average pool's own divisor stands among its arguments.
DIVISOR = 6


def _sizes(node: Node, rank: int) -> list[int]:
    """Lengths of the last ``rank`` axes of what a node reads."""
    source: Any = node.args[0]
    return [int(size) for size in source.meta["val"].shape[-rank:]]


def _replace(node: Node, found: Node) -> None:
    found.meta = dict(node.meta)
    node.replace_all_uses_with(found)
    node.graph.erase_node(node)


def _plain_mean(module: GraphModule, node: Node) -> None:
    """To one number as a mean: torch's own rules look at how the input lies in memory. In three axes of space, whose
    windows no converter knows, as a plain pool where they are equal, and a product where not."""
    import torch

    aten, graph = torch.ops.aten, module.graph
    wanted: Any = node.args[1]
    rank = len(wanted)
    if all(size == 1 for size in wanted):
        with graph.inserting_before(node):
            mean = graph.call_function(aten.mean.dim, (node.args[0], list(range(-rank, 0)), True))
        _replace(node, mean)
        return
    if rank < 3:
        return
    sizes = _sizes(node, rank)
    with graph.inserting_before(node):
        if all(size % want == 0 for size, want in zip(sizes, wanted, strict=True)):
            kernel = [size // want for size, want in zip(sizes, wanted, strict=True)]
            found = graph.call_function(aten.avg_pool3d.default, (node.args[0], kernel, kernel))
        else:
            shares = [
                keep_computed(module, graph, window_shares(adaptive_windows(size, want), size))
                for size, want in zip(sizes, wanted, strict=True)
            ]
            found = graph.call_function(shared_out, (node.args[0], shares))
    _replace(node, found)


def _adaptive_maximum(module: GraphModule, node: Node) -> None:
    """A plain pool where windows are equal and nobody asks for places; else a choice of rows by axis."""
    import torch

    aten, graph = torch.ops.aten, module.graph
    wanted: Any = node.args[1]
    rank = len(wanted)
    sizes = _sizes(node, rank)
    pools = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
    if not _reads_places(node) and all(size % want == 0 for size, want in zip(sizes, wanted, strict=True)):
        kernel = [size // want for size, want in zip(sizes, wanted, strict=True)]
        with graph.inserting_before(node):
            found = graph.call_function(pools[rank - 1], (node.args[0], kernel, kernel))
        _replace_values(node, found)
        return
    tables = [adaptive_windows(size, want) for size, want in zip(sizes, wanted, strict=True)]
    _choose(module, node, tables)


def _placed_maximum(module: GraphModule, node: Node) -> None:
    """A maximum with its places: plain where nobody reads the places."""
    import torch

    aten, graph = torch.ops.aten, module.graph
    given: list[Any] = [*node.args, *[None] * (6 - len(node.args))]
    rank = len(given[1])
    if not _reads_places(node):
        pools = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
        with graph.inserting_before(node):
            found = graph.call_function(pools[rank - 1], node.args)
        _replace_values(node, found)
        return
    _choose(module, node, max_windows(_sizes(node, rank), *given[1:]))


def _reads_places(node: Node) -> bool:
    return any(user.args[1] == 1 and user.users for user in node.users)


def _replace_values(node: Node, found: Node) -> None:
    """A pool that answers values alone, in the place of one that answers values and places."""
    for user in list(node.users):
        if user.args[1] == 0:
            found.meta = dict(user.meta)
            user.replace_all_uses_with(found)
        user.graph.erase_node(user)
    node.graph.erase_node(node)


def _choose(module: GraphModule, node: Node, tables: Sequence[Tensor]) -> None:
    graph = module.graph
    with graph.inserting_before(node):
        if not _reads_places(node):
            _replace_values(node, graph.call_function(largest_of, (node.args[0], _kept(module, tables))))
            return
        found = graph.call_function(largest_and_where, (node.args[0], _kept(module, tables)))
    _replace(node, found)


def _kept(module: GraphModule, tables: Sequence[Tensor]) -> list[list[Node]]:
    """For each axis, the choice of rows for each place in a window."""
    kept = []
    for table in tables:
        kept.append([keep_computed(module, module.graph, rows.contiguous()) for rows in table.t()])
    return kept
