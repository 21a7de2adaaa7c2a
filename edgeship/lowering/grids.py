"""Which activation each quantize operator of a graph belongs to, kept over rewrites that give operators new names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeship.compat.torch import pair_operators
from edgeship.errors import LoweringError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import Graph, Node

ops = pair_operators()


def quantized(graph: Graph) -> list[str]:
    """The activations that a graph quantizes, in the order of the graph; asked before any rewrite."""
    return [node.all_input_nodes[0].name for node in _quantizers(graph)]


def quantizers(graph: Graph, activations: Sequence[str], title: str) -> dict[str, Node]:
    """Activation -> its quantize operator in the rewritten graph.

    Args:
        graph: rewritten; rewrites keep the order of what they leave alone.
        activations: from `quantized`.
        title: the runtime's name, for the error.

    Raises:
        LoweringError: a rewrite added or dropped a quantize operator.
    """
    nodes = _quantizers(graph)
    if len(nodes) != len(activations):
        raise LoweringError(
            f"{title}: {len(activations)} activations were to be quantized, and {len(nodes)} are",
            fix="use float activations, or report the model",
        )
    return dict(zip(activations, nodes, strict=True))


def _quantizers(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.target == ops.quantize_per_tensor.default]
