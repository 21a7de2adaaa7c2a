"""Products of two 16-bit activations on Hexagon.

onnxruntime-qnn 2.7.0 converts the second operand of MatMul from uint16 to uint8 before the HTP sees it: 43 dB where the
integers allow 78. Its Einsum becomes the same QNN product without that conversion. Drop when the provider keeps 16 bits
(onnxruntime-qnn pull requests 300, 502 and 793 went back and forth on it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

    from edgeship.lowering.qnn.graph import Graph

# Hexagon v73 is the first with products of 16 by 16 bits.
FIRST_WIDE_ARCH = 73
BATCH_AXES = "abc"


def keep_products_wide(graph: Graph, htp_arch: int) -> int:
    """Rewrite every MatMul of two uint16 activations as Einsum. Returns how many."""
    import onnx

    if htp_arch < FIRST_WIDE_ARCH:
        return 0
    changed = 0
    for node in graph.nodes:
        if node.op_type != "MatMul" or not all(_is_wide(graph, name) for name in node.input):
            continue
        left, right = (graph.shape_of(name) for name in node.input)
        if left is None or right is None or len(left) != len(right) or left[:-2] != right[:-2]:
            continue
        batch = BATCH_AXES[: len(left) - 2]
        if len(batch) != len(left) - 2:
            continue
        node.op_type = "Einsum"
        node.attribute.append(onnx.helper.make_attribute("equation", f"{batch}qd,{batch}dk->{batch}qk"))
        changed += 1
    return changed


def _is_wide(graph: Graph, name: str) -> bool:
    node: onnx.NodeProto | None = graph.made_by.get(name)
    if node is None or graph.scale_of(name) is None:
        return False
    return bool(graph.array(node.input[2]).dtype.name == "uint16")
