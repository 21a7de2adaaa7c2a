"""The order of nodes: files of some tools (casts that a converter adds, for one) list a node before what it reads."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from onnx import AttributeProto, NodeProto


def names_read(node: NodeProto) -> Iterator[str]:
    """Every name that a node, or a graph inside it, may read from outside."""
    yield from node.input
    for attribute in node.attribute:
        bodies = [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
        for body in bodies:
            for inner in body.node:
                yield from names_read(inner)
            yield from (info.name for info in body.output)


def in_order(nodes: Sequence[NodeProto]) -> Sequence[NodeProto]:
    """The nodes so that each comes after those it reads, else in the file's order.

    Nodes that read each other in a circle come last, for whoever runs them to refuse.
    """
    maker: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in node.output:
            maker.setdefault(name, index)
    # Of each node: those it reads.
    reads: list[set[int]] = []
    for index, node in enumerate(nodes):
        before = {maker[name] for name in names_read(node) if name and name in maker}
        reads.append(before - {index})
    if all(max(before, default=-1) < index for index, before in enumerate(reads)):
        return nodes
    return [nodes[index] for index in _sorted(reads)]


def _sorted(reads: Sequence[set[int]]) -> list[int]:
    """A topological order, the smallest index first wherever there is a choice."""
    waiting = [len(before) for before in reads]
    readers: dict[int, list[int]] = {}
    for index, before in enumerate(reads):
        for other in before:
            readers.setdefault(other, []).append(index)
    free = [index for index, count in enumerate(waiting) if count == 0]
    heapq.heapify(free)
    found: list[int] = []
    while free:
        index = heapq.heappop(free)
        found.append(index)
        for reader in readers.get(index, ()):
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(free, reader)
    placed = set(found)
    return [*found, *(index for index in range(len(reads)) if index not in placed)]
