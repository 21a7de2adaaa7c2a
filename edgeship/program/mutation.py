"""Operators that write in place, seen before anything is dropped or folded: a copy may be there to protect its source.

The second export makes the graph functional; until then, who shares storage with whom decides what may be changed.
"""

from __future__ import annotations

import operator
from collections.abc import Container
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from edgeship.errors import SourceError

if TYPE_CHECKING:
    from torch.fx import Graph, Node

# What a batch norm writes in training mode.
_OF_TRAINING = ("running_mean", "running_var", "num_batches_tracked")
# At inference these write nothing.
HARMLESS = ("dropout_", "feature_dropout_", "detach_", "requires_grad_")


def written(node: Node) -> list[Node]:
    """The arguments that an operator writes into, by their roots."""
    schema = _schema(node)
    if schema is None or not schema.is_mutable or schema.name.partition("::")[2] in HARMLESS:
        return []
    pairs = [(item, node.args[i] if i < len(node.args) else None) for i, item in enumerate(schema.arguments)]
    return [
        root(value)
        for item, value in pairs
        if item.alias_info is not None and item.alias_info.is_write and hasattr(value, "all_input_nodes")
    ]


def root(value: object) -> Node:
    """The node that owns the storage which ``value`` shows a part of."""
    node = cast("Node", value)
    while True:
        source = _shared(node)
        if source is None:
            return node
        node = source


def refuse_state(graph: Graph) -> None:
    """Raise `SourceError` when the model writes into its own buffers or parameters."""
    for node in graph.nodes:
        for owner in written(node):
            if owner.op == "get_attr":
                fix = "return them as outputs instead"
                if str(owner.target).rpartition(".")[2] in _OF_TRAINING:
                    fix = "a batch norm is in training mode; call model.eval() before torch.export.export"
                raise SourceError(f"the model changes its buffers while it runs: {owner.target}", fix=fix)


def protect_inputs(graph: Graph) -> None:
    """Let a model that writes into its input write into a copy: callers of an artifact keep theirs."""
    import torch

    for placeholder in {owner for node in graph.nodes for owner in written(node) if owner.op == "placeholder"}:
        last = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
        with graph.inserting_before(last):
            copy = graph.call_function(torch.ops.aten.clone.default, (placeholder,))
        copy.meta = dict(placeholder.meta)
        placeholder.replace_all_uses_with(copy, delete_user_cb=partial(operator.is_not, copy))


def written_roots(graph: Graph) -> set[Node]:
    """Every node whose storage some operator writes into."""
    return {owner for node in graph.nodes for owner in written(node)}


def unsettled(graph: Graph, known: Container[Node]) -> set[Node]:
    """Roots that must not be computed ahead: an operator that is not ``known`` writes them, or reads them between
    writes."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    last_write: dict[Node, int] = {}
    found: set[Node] = set()
    for node in graph.nodes:
        for owner in written(node):
            last_write[owner] = order[node]
            if node not in known:
                found.add(owner)
    for node in graph.nodes:
        if node.op == "call_function" and node not in known:
            owners = {root(argument) for argument in node.all_input_nodes}
            found |= {owner for owner in owners if last_write.get(owner, -1) > order[node]}
    return found


def _shared(node: Node) -> Node | None:
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return cast("Node", node.args[0])
    schema = _schema(node)
    if schema is None:
        return None
    for item, value in zip(schema.arguments, node.args, strict=False):
        if item.alias_info is not None and hasattr(value, "all_input_nodes"):
            return cast("Node", value)
    return None


def _schema(node: Node) -> Any:
    from edgeship.compat.torch import schema_of

    return schema_of(node.target)
