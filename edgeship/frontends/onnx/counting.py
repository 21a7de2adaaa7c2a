"""How many nodes a model has once its functions are written out, found without writing them out."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import AttributeProto, ModelProto, NodeProto

from edgeship.errors import LimitError, SourceError
from edgeship.frontends.onnx.graph import normal_domain

#: Tracing and the passes take milliseconds a node; exporters' largest graphs have some 20,000.
MAX_NODES = 50_000
_DEEPEST = 200

Key = tuple[str, str, str]


def check_node_count(model: ModelProto) -> None:
    """Refuse a model that would take hours: bodies that double thirty times are 90 nodes in the file.

    Raises:
        LimitError: more than `MAX_NODES`. SourceError: a function calls itself.
    """
    bodies = {(normal_domain(f.domain), f.name, f.overload): f.node for f in model.functions}
    counts: dict[Key, int] = {}

    def count(nodes: Iterable[NodeProto], depth: int) -> int:
        if depth > _DEEPEST:
            raise SourceError(
                "functions are nested too deeply: they call each other without end",
                fix="check the file with onnx.checker",
            )
        total = 0
        for node in nodes:
            key = (normal_domain(node.domain), node.op_type, node.overload)
            if key in bodies and key not in counts:
                counts[key] = count(bodies[key], depth + 1)
            total += counts.get(key, 1)
            for attribute in node.attribute:
                graphs = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
                for graph in graphs:
                    total += count(graph.node, depth + 1)
        return total

    total = count(model.graph.node, 0)
    if total > MAX_NODES:
        shown = str(total) if total < 10**9 else f"10^{len(str(total)) - 1}"
        raise LimitError(
            f"the graph has {shown} nodes with its functions, {MAX_NODES} at most", fix="give a smaller model"
        )
