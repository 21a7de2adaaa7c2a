"""Session options that an app must set so that ONNX Runtime computes what was decided.

By default ONNX Runtime rounds the *activations* of every ``DequantizeLinear -> MatMul`` to int8 while running (accuracy
level 4, about 45 dB). Where a weight has another form (docs/decisions/0007) the arithmetic is in the file, and no
option is needed; this is for products that are left in that form.

Products of uint8 activations and int8 weights are summed in pairs in 16 bits by x86 processors with AVX2 and no VNNI,
and pairs above 32767 are cut off: dozens of steps lost. An option lets ONNX Runtime hold the weights as uint8 there,
which is exact; processors that sum in 32 bits, as all of ARM, take no notice of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeship.lowering.onnx.edit import weight_scale

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.core.forms import ActivationMode

ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
PRECISION = "session.x64quantprecision"
LEVELS = {"float": "1", "dynamic": "4"}


def session_options(model: ir.Model, activations: ActivationMode, *, bytes_meet: bool = False) -> dict[str, str]:
    """Session configuration entries for a finished graph.

    Args:
        activations: what the profile chose. bytes_meet: whether activations of 8 bits are multiplied with weights.
    """
    # ONNX Runtime 1.31 cannot turn a weight that two layers read: it makes the same tensor twice, and stops.
    exact = {PRECISION: "1"} if bytes_meet and not _shares_weights(model) else {}
    return exact | _levels(model, activations)


def _shares_weights(model: ir.Model) -> bool:
    """Whether two operators read what one stored weight is decoded to, such as a table that is a head as well."""
    return any(
        node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer() and len(node.outputs[0].uses()) > 1
        for node in model.graph
    )


def _levels(model: ir.Model, activations: ActivationMode) -> dict[str, str]:
    """How activations of products that only say what their weights are become integers."""
    if not any(node.op_type in ("MatMul", "Gemm") and any(map(_is_encoded, node.inputs)) for node in model.graph):
        return {}
    return {ACCURACY_LEVEL: LEVELS.get(activations, "1")}


def _is_encoded(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    behind = node.inputs[0] if node is not None and node.op_type == "Transpose" else value
    return weight_scale(behind) is not None
