"""A floor in front of a logarithm, below what float16 holds, goes behind it: Hexagon would take 1e-10 for 6e-8.

A constant that is added there for the same reason is such a floor too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

    from edgeship.lowering.qnn.graph import Graph

# The smallest number that float16 holds with all its bits.
LEAST = 2.0**-14
# Two of its smallest steps: what is below says nothing.
LEAST_STEPS = 2.0**-23
# What numbers below 1 are multiplied by before their logarithm is taken.
RISE = 4096.0


def floor_behind_logs(graph: Graph) -> int:
    """Rewrite ``log(max(x, floor))`` and ``log(x + floor)`` for tiny floors: what float16 takes for 0 has the floor's
    logarithm.

    Between the floor and 2^-23 that is the floor as well. Returns how many.
    """
    import numpy as np

    changed = 0
    for node in graph.nodes:
        guard = graph.made_by.get(node.input[0]) if node.op_type == "Log" else None
        found = None if guard is None else _guarded(graph, guard)
        if guard is None or found is None or not 0 < found[1] < LEAST:
            continue
        stem, (x, floor) = node.output[0], found

        def number(name: str, value: float, stem: str = stem) -> str:
            return graph.constant(f"{stem}_{name}", np.array(value, np.float32))

        # Below 2^-11 the emulator's logarithm stands still; small numbers are raised first, a square before it is one.
        base = _squared(graph, x)
        if base is None:
            raised = graph.add(node, "Mul", [x, number("rise", RISE)], f"{stem}_raised")
        else:
            grown = graph.add(node, "Mul", [base, number("root_of_rise", RISE**0.5)], f"{stem}_grown")
            raised = graph.add(node, "Mul", [grown, grown], f"{stem}_raised")
        none = graph.add(node, "Less", [raised, number("seen", LEAST_STEPS * (1 if base else RISE))], f"{stem}_none")
        if guard.op_type == "Add" and RISE * floor >= 2 * LEAST_STEPS:
            raised = graph.add(node, "Add", [raised, number("rest", RISE * floor)], f"{stem}_raised_sum")
        low = graph.add(node, "Log", [raised], f"{stem}_of_raised")
        low = graph.add(node, "Sub", [low, number("risen", float(np.log(RISE)))], f"{stem}_low")
        high = graph.add(node, "Log", [x], f"{stem}_high")
        small = graph.add(node, "Less", [x, number("one", 1.0)], f"{stem}_small")
        value = graph.add(node, "Where", [small, low, high], f"{stem}_found")
        least = number("floor", float(np.log(floor)))
        graph.replace(node, graph.add(node, "Where", [none, least, value], f"{stem}_bounded"))
        changed += 1
    return changed


def _squared(graph: Graph, name: str) -> str | None:
    """What a value is the square of; None where it is none."""
    maker = graph.made_by.get(name)
    if maker is None:
        return None
    times_itself = maker.op_type == "Mul" and maker.input[0] == maker.input[1]
    power = graph.array(maker.input[1]) if maker.op_type == "Pow" and maker.input[1] in graph.constants else None
    squared = power is not None and power.size == 1 and float(power.reshape(-1)[0]) == 2
    return str(maker.input[0]) if times_itself or squared else None


def _guarded(graph: Graph, guard: onnx.NodeProto) -> tuple[str, float] | None:
    """What is kept from 0, and by how much; None where ``guard`` is something else."""
    given = list(guard.input)
    if guard.op_type not in ("Clip", "Max", "Add") or len(given) < 2:
        return None
    if guard.op_type == "Clip" and len(given) > 2 and given[2]:
        return None
    # Of a sum and a maximum the constant may stand first.
    if guard.op_type != "Clip" and given[0] in graph.constants:
        given[:2] = given[1::-1]
    if given[1] not in graph.constants or len(given) > 3:
        return None
    array = graph.array(given[1])
    return (given[0], float(array.reshape(-1)[0])) if array.size == 1 and array.dtype.kind == "f" else None
