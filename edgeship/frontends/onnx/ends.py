"""``--cut``: an ONNX graph that ends at named values, with the inputs that these need and no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

from edgeship.core.names import quoted
from edgeship.errors import UsageError
from edgeship.program.ends import check_ends, near


def end_at(model: ModelProto, names: Sequence[str]) -> None:
    """Let the graph end at the named values, in place.

    Raises:
        UsageError: a node makes no value of that name, or what is left uses no input.
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output if name}
    for name in names:
        if name not in makers:
            raise UsageError(f"--cut {quoted(name)}: no node of the graph makes that value", fix=near(name, makers))
    wanted = _needed(makers, names)
    nodes = [node for node in graph.node if wanted.intersection(node.output)]
    held = {tensor.name for tensor in graph.initializer}
    held |= {sparse.values.name for sparse in graph.sparse_initializer}
    inputs = [info for info in graph.input if info.name in wanted]
    check_ends(any(info.name not in held for info in inputs), names)
    known = {info.name: info for info in (*graph.value_info, *graph.output)}
    outputs = [known.get(name, ValueInfoProto(name=name)) for name in dict.fromkeys(names)]
    for kept, entries in ((graph.node, nodes), (graph.input, inputs), (graph.output, outputs)):
        copies = [_copied(entry) for entry in entries]
        del kept[:]
        kept.extend(copies)


def _copied(entry: NodeProto | ValueInfoProto) -> NodeProto | ValueInfoProto:
    made = type(entry)()
    made.CopyFrom(entry)  # type: ignore[arg-type]
    return made


def _needed(makers: dict[str, NodeProto], names: Sequence[str]) -> set[str]:
    """Every value that the named ones are computed from, and they themselves."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if name in makers:
            waiting += reads(makers[name])
    return found


def reads(node: NodeProto) -> Iterator[str]:
    """Every name that a node, or a graph inside it, may read from outside."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        bodies: list[GraphProto] = [attribute.g, *attribute.graphs]
        for body in bodies:
            for inner in body.node:
                yield from reads(inner)
            yield from (info.name for info in body.output)
