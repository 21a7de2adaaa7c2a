"""Tanh on Hexagon in float16.

Fused into the product before it, its approximation is good to 33 dB only (seen with onnxruntime-qnn 2.7.0; alone it
reaches 67 dB). ``-tanh(-x)`` is the same number and does not fuse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeship.lowering.qnn.graph import Graph

PRODUCTS = ("Gemm", "Conv", "Add", "MatMul", "ConvTranspose")


def keep_tanh_apart(graph: Graph) -> int:
    """Put negations around every Tanh of a float graph that follows a product. Returns how many."""
    changed = 0
    for node in graph.nodes:
        maker = graph.made_by.get(node.input[0]) if node.op_type == "Tanh" else None
        if maker is None or maker.op_type not in PRODUCTS:
            continue
        turned = graph.add(node, "Neg", [node.input[0]], f"{node.output[0]}_turned")
        answer = graph.add(node, "Tanh", [turned], f"{node.output[0]}_apart")
        graph.replace(node, graph.add(node, "Neg", [answer], f"{node.output[0]}_back"))
        changed += 1
    return changed
