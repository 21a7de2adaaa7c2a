"""Parameters of normalisations on Hexagon.

With float gamma and beta a 16-bit LayerNormalization compiles, and the matrix product after it is silently wrong in the
emulator (seen with onnxruntime-qnn 2.7.0; -1 dB, and 82 dB once both are integers). So gamma is stored in 16 bits
beside 16-bit activations and in 8 beside 8-bit ones, and beta in 32 bits with the scale of their product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

    from edgeship.lowering.qnn.graph import Graph

NORMS = ("LayerNormalization", "InstanceNormalization")
# Room for the sum that beta joins.
MAX_BETA = 2**30


def quantize_norms(graph: Graph) -> int:
    """Rewrite gamma and beta of every normalisation between quantized activations. Returns how many."""
    changed = 0
    for node in graph.nodes:
        if node.op_type not in NORMS:
            continue
        scale = graph.scale_of(node.input[0])
        parameters = [name for name in list(node.input)[1:3] if name]
        if scale is None or not parameters or any(name not in graph.constants for name in parameters):
            continue
        _quantize(graph, node, scale)
        changed += 1
    return changed


def _quantize(graph: Graph, node: onnx.NodeProto, scale: float) -> None:
    import numpy as np

    restore = graph.made_by[node.input[0]]
    wide = graph.array(restore.input[2]).dtype.itemsize == 2
    gamma = graph.array(node.input[1]).astype(np.float64)
    beta = graph.array(node.input[2]).astype(np.float64) if len(node.input) > 2 and node.input[2] else 0 * gamma
    dtype, levels, middle = (np.uint16, 32767, 32768) if wide else (np.uint8, 127, 128)
    # Widened where beta would not fit its 32 bits.
    step = max(np.abs(gamma).max() / levels, np.abs(beta).max() / (MAX_BETA * scale), 2.0**-24)
    step = np.float32(step)
    stem = node.output[0]
    gamma_name = graph.add(
        node,
        "DequantizeLinear",
        [
            graph.constant(f"{stem}_gamma_q", (np.rint(gamma / step) + middle).astype(dtype)),
            graph.constant(f"{stem}_gamma_scale", np.array(step, np.float32)),
            graph.constant(f"{stem}_gamma_zero", np.array(middle, dtype)),
        ],
        f"{stem}_gamma",
    )
    unit = np.float32(np.float32(scale) * step)
    beta_name = graph.add(
        node,
        "DequantizeLinear",
        [
            graph.constant(f"{stem}_beta_q", np.rint(beta / unit).astype(np.int32)),
            graph.constant(f"{stem}_beta_scale", np.array(unit, np.float32)),
            graph.constant(f"{stem}_beta_zero", np.array(0, np.int32)),
        ],
        f"{stem}_beta",
    )
    del node.input[1:]
    node.input.extend([gamma_name, beta_name])
