"""8-bit weights that ONNX Runtime widens once, at load: ``(integers - zero) * scale`` in plain operators.

It folds these into a float32 constant, whatever options the app sets, and computes at float32's speed. Of
``DequantizeLinear`` it would make kernels that round activations to int8, or compute more slowly than float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeship.lowering.onnx.edit import constant, insert, made_later, scales
from edgeship.lowering.onnx.embedding import gather_integers

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx_ir as ir

    Array = npt.NDArray[Any]


def widen_at_load(
    model: ir.Model, value: ir.Value, name: str, values: Array, scale: Array, zero: Array | None
) -> ir.Value:
    """Let every use of ``value`` read the widened weight, but lookups of rows the integers; returns the integers.

    Args:
        values: int8, or uint8 with ``zero``, in the layout of ``value``.
        scale, zero: same rank; one number a block.
    """
    import numpy as np
    import onnx_ir as ir

    shape = values.shape
    axis = next((axis for axis, size in enumerate(scale.shape) if size not in (1, shape[axis])), None)
    if axis is not None:
        size = shape[axis] // scale.shape[axis]
        values = values.reshape(*shape[:axis], scale.shape[axis], size, *shape[axis + 1 :])
        scale = np.expand_dims(scale, axis + 1)
        zero = None if zero is None else np.expand_dims(zero, axis + 1)
    dtype = ir.DataType.INT8 if zero is None else ir.DataType.UINT8
    stored = made_later(model, f"{name}_q", lambda: values, dtype, values.shape)
    if zero is None and scale.size == scale.shape[0]:
        gather_integers(
            model, value, [stored, constant(model, f"{name}_row_scale", scale.reshape(-1 if scale.size > 1 else ()))]
        )
    uses = {use.node for use in value.uses()}
    if not uses:
        return stored
    first = next(node for node in model.graph if node in uses)
    to = int(ir.DataType.FLOAT)
    result = insert(model, first, "Cast", [stored], f"{name}_cast", ir.DataType.FLOAT, values.shape, to=to)
    if zero is not None:
        place = constant(model, f"{name}_zero", np.ascontiguousarray(zero))
        offset = insert(model, first, "Cast", [place], f"{name}_offset", ir.DataType.FLOAT, zero.shape, to=to)
        result = insert(model, first, "Sub", [result, offset], f"{name}_shifted", ir.DataType.FLOAT, values.shape)
    factor = scales(model, first, f"{name}_scale", scale)
    result = insert(model, first, "Mul", [result, factor], f"{name}_scaled", ir.DataType.FLOAT, values.shape)
    if axis is not None:
        target = constant(model, f"{name}_shape", np.array(shape, np.int64))
        result = insert(model, first, "Reshape", [result, target], f"{name}_value", ir.DataType.FLOAT, shape)
    value.replace_all_uses_with(result)
    return stored
