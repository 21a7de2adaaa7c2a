"""Sums on Hexagon in float16 that a constant divides afterwards.

Its ReduceSum ends at 131008, its ReduceMean has no such end: it divides before it adds (seen with onnxruntime-qnn
2.7.0; the mean of 512 numbers around 9000 is right to 72 dB, and their sum is not there). Norms that are spelled out
by sums of squares meet it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

    from edgeship.lowering.qnn.graph import Graph

# A factor this near to 1 is one: 1 / n, written in float32.
ONE = 1e-6


def divide_before_sums(graph: Graph) -> int:
    """Write every ``sum(x) * c``, ``c`` a constant below 1, as ``mean(x) * (c n)``. Returns how many."""
    import numpy as np

    changed = 0
    for node in graph.nodes:
        found = _scaled_sum(graph, node)
        if found is None:
            continue
        total, factor, count = found
        kept = next((int(item.i) for item in total.attribute if item.name == "keepdims"), 1)
        inputs = [name for name in total.input if name]
        rest = factor * count
        made = node.output[0]
        value = graph.add(node, "ReduceMean", inputs, f"{made}_mean", keepdims=kept)
        if abs(rest - 1) > ONE:
            number = graph.constant(f"{made}_rest", np.array(rest, np.float32))
            value = graph.add(node, "Mul", [value, number], f"{made}_scaled")
        graph.replace(node, value)
        changed += 1
    return changed


def _scaled_sum(graph: Graph, node: onnx.NodeProto) -> tuple[onnx.NodeProto, float, int] | None:
    """The sum that ``node`` alone multiplies by a constant, the constant, and how many numbers are added."""
    if node.op_type not in ("Mul", "Div") or len(node.input) != 2:
        return None
    for place in (0, 1) if node.op_type == "Mul" else (0,):
        total, other = graph.made_by.get(node.input[place]), node.input[1 - place]
        if total is None or total.op_type != "ReduceSum" or other not in graph.constants:
            continue
        number = graph.array(other)
        alone = len(graph.read_by[total.output[0]]) == 1 and total.output[0] not in graph.ends
        count = _count(graph, total)
        if number.size != 1 or number.dtype.kind != "f" or not alone or not count:
            continue
        factor = float(number.reshape(-1)[0])
        if node.op_type == "Div":
            factor = 1 / factor if factor else math.inf
        return (total, factor, count) if 0 < abs(factor) < 1 else None
    return None


def _count(graph: Graph, total: onnx.NodeProto) -> int:
    """How many numbers a sum adds for each of its own; 0 where that is not known."""
    shape = graph.shape_of(total.input[0])
    if shape is None or len(total.input) < 2 or total.input[1] not in graph.constants:
        return 0
    return math.prod(shape[int(axis)] for axis in graph.array(total.input[1]).reshape(-1))
