"""A floor in front of a logarithm, below what float16 holds, goes behind it: Hexagon would take 1e-10 for 6e-8."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

    from edgeship.lowering.qnn.graph import Graph

# The smallest number that float16 holds with all its bits.
LEAST = 2.0**-14
# What numbers below 1 are multiplied by before their logarithm is taken.
RISE = 4096.0


def floor_behind_logs(graph: Graph) -> int:
    """Rewrite ``log(max(x, floor))`` for tiny floors: what float16 takes for 0 has the floor's logarithm.

    Between the floor and 2^-23 that is the floor as well. Returns how many.
    """
    import numpy as np

    changed = 0
    for node in graph.nodes:
        clip = graph.made_by.get(node.input[0]) if node.op_type == "Log" else None
        floor = None if clip is None else _floor(graph, clip)
        if clip is None or floor is None or not 0 < floor < LEAST:
            continue
        stem, x = node.output[0], clip.input[0]

        def number(name: str, value: float, stem: str = stem) -> str:
            return graph.constant(f"{stem}_{name}", np.array(value, np.float32))

        # Below 2^-11 the emulator's logarithm stands still; small numbers are raised first.
        raised = graph.add(node, "Mul", [x, number("rise", RISE)], f"{stem}_raised")
        low = graph.add(node, "Log", [raised], f"{stem}_of_raised")
        low = graph.add(node, "Sub", [low, number("risen", float(np.log(RISE)))], f"{stem}_low")
        high = graph.add(node, "Log", [x], f"{stem}_high")
        small = graph.add(node, "Less", [x, number("one", 1.0)], f"{stem}_small")
        found = graph.add(node, "Where", [small, low, high], f"{stem}_found")
        none = graph.add(node, "Less", [x, number("seen", 2.0**-23)], f"{stem}_none")
        least = number("floor", float(np.log(floor)))
        found = graph.add(node, "Where", [none, least, found], f"{stem}_bounded")
        graph.replace(node, found)
        changed += 1
    return changed


def _floor(graph: Graph, clip: onnx.NodeProto) -> float | None:
    given = list(clip.input)
    if clip.op_type not in ("Clip", "Max") or len(given) < 2 or given[1] not in graph.constants:
        return None
    if clip.op_type == "Clip" and len(given) > 2 and given[2]:
        return None
    array = graph.array(given[1])
    return float(array.reshape(-1)[0]) if array.size == 1 and len(given) <= 3 else None
