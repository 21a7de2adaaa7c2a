"""Sigmoids that are answers, on Hexagon in float16.

Its own is off by 0.003 in absolute terms: a score of 0.02 comes out 10 % too small (20 dB, seen with onnxruntime-qnn
2.7.0). ``1 / (1 + exp(-x))`` reaches 60 dB there. Inside a network the error is nothing beside what it is added to, and
a SiLU is one operator; so what an output shows is written so, and SiLUs where one follows another so often that their
errors add up: MobileViT and YOLO11n end at 29 and 23 dB with Hexagon's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

    from edgeship.lowering.qnn.graph import Graph

# Between these the exponential stays within float16; beyond them a share is below 2e-5, or as far from 1.
LOWEST, HIGHEST = -11.0, 16.0
# SiLUs of a network whose errors are still nothing beside float16's.
FEW_SILUS = 8
# What moves, joins, chooses, picks or averages scores, and products of scores.
HANDING_ON = (
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Slice", "Split", "Gather", "Identity", "Mul",
    "ReduceMax", "Max", "ReduceMean", "ReduceMin", "Min", "GlobalAveragePool", "AveragePool", "MaxPool",
    "Where", "Clip", "Expand", "Tile", "Pad", "GatherElements", "GatherND", "ScatterElements", "ScatterND", "TopK",
    "DepthToSpace", "SpaceToDepth", "Resize", "ReduceSum", "Sum", "Sqrt", "Pow", "Div", "Cast", "GlobalMaxPool",
)  # fmt: skip


def spell_out_sigmoids(graph: Graph) -> int:
    """Write every Sigmoid whose answers reach an output, moved, joined or multiplied, by its exponential, and those of
    SiLUs where a float network has more than a few.

    Returns how many.
    """
    import numpy as np

    changed = 0
    sigmoids = [node for node in graph.nodes if node.op_type == "Sigmoid"]
    silus = {node.output[0] for node in sigmoids if _is_float_silu(graph, node)}
    for node in sigmoids:
        adds_up = len(silus) > FEW_SILUS and node.output[0] in silus
        if not adds_up and not _is_answer(graph, node.output[0], node.input[0]):
            continue
        x, made = node.input[0], node.output[0]
        one, *ends = (
            graph.constant(f"sigmoid_{name}", np.array(value, np.float32))
            for name, value in (("one", 1.0), ("lowest", LOWEST), ("highest", HIGHEST))
        )
        bounded = graph.add(node, "Clip", [x, *ends], f"{made}_bounded")
        turned = graph.add(node, "Neg", [bounded], f"{made}_turned")
        grown = graph.add(node, "Exp", [turned], f"{made}_grown")
        above = graph.add(node, "Add", [grown, one], f"{made}_above")
        graph.replace(node, graph.add(node, "Div", [one, above], f"{made}_share"))
        changed += 1
    return changed


def _is_float_silu(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a sigmoid is only multiplied by what it was made of, and neither has a grid of integers."""
    x, made = node.input[0], node.output[0]
    users = graph.read_by.get(made, ())
    gates = all(user.op_type == "Mul" and x in user.input for user in users)
    return bool(users) and gates and made not in graph.ends and graph.scale_of(x) is None


def _is_answer(graph: Graph, value: str, source: str) -> bool:
    """Whether an output shows a value that was made of ``source``; not where the two are multiplied."""
    seen: set[str] = set()
    waiting = [value]
    while waiting:
        name = waiting.pop()
        if name in graph.ends:
            return True
        for user in graph.read_by.get(name, ()):
            if user.op_type in HANDING_ON and source not in user.input and user.output[0] not in seen:
                seen.update(user.output)
                waiting += user.output
    return False
