"""Session options that an app must set so that ONNX Runtime computes what was decided.

By default ONNX Runtime rounds the *activations* of every ``DequantizeLinear -> MatMul`` to int8 while running (accuracy
level 4, about 45 dB). Where a weight has another form (docs/decisions/0007) the arithmetic is in the file, and no
option is needed; this is for products that are left in that form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeship.lowering.onnx.edit import weight_scale

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.core.forms import ActivationMode

ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
LEVELS = {"float": "1", "dynamic": "4"}


def session_options(model: ir.Model, activations: ActivationMode) -> dict[str, str]:
    """Session configuration entries for a finished graph; ``activations`` is what the profile chose."""
    if not any(node.op_type in ("MatMul", "Gemm") and any(map(_is_encoded, node.inputs)) for node in model.graph):
        return {}
    return {ACCURACY_LEVEL: LEVELS.get(activations, "1")}


def _is_encoded(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    behind = node.inputs[0] if node is not None and node.op_type == "Transpose" else value
    return weight_scale(behind) is not None
