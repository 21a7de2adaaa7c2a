"""Products by encoded weights as Gemm, where activations are static.

Only Gemm takes the bias in int32 and the weight as it lies, and it is the form in which Hexagon has scales per channel.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgeship.errors import LoweringError
from edgeship.lowering.onnx.edit import constant, insert, quantizer, weight_scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir


def products_as_gemm(model: ir.Model) -> None:
    """``MatMul`` by an encoded weight, ``+ bias``: Reshape to rank 2, Gemm, Reshape.

    The Reshapes get pairs with the numbers of their neighbours, which changes no value.
    """
    flattened: dict[ir.Value, ir.Value] = {}
    for product in [node for node in model.graph if node.op_type == "MatMul"]:
        x, (weight, turned) = product.inputs[0], _untransposed(product.inputs[1])
        if x is None or weight is None or quantizer(x) is None or weight_scale(weight) is None:
            continue
        if x.shape is None or weight.shape is None:
            continue
        if x not in flattened:
            rows = math.prod(int(size) for size in x.shape[:-1])
            flat = _reshaped(model, product, x, (rows, int(x.shape[-1])), f"{product.name}_rows")
            flattened[x] = _paired(model, flat, x, product)
        _replace(model, product, flattened[x], weight, turned)
    _drop_unused_transposes(model)


def _replace(model: ir.Model, product: ir.Node, rows: ir.Value, weight: ir.Value, turned: bool) -> None:
    bias, result = _added_bias(product)
    columns = int((weight.shape or (0, 0))[0 if turned else 1])
    inputs = [rows, weight, *([] if bias is None else [bias])]
    size = (int((rows.shape or (0,))[0]), columns)
    gemm = insert(model, product, "Gemm", inputs, f"{product.name}_gemm", rows.dtype, size, transB=int(turned))
    users = result.uses()
    after = users[0].node if len(users) == 1 and not result.is_graph_output() else None
    if after is not None and after.op_type == "QuantizeLinear":
        gemm = _paired(model, gemm, after.outputs[0].uses()[0].node.outputs[0], product)
    whole_shape = [int(size) for size in result.shape or ()]
    whole = _reshaped(model, product, gemm, whole_shape, f"{product.name}_whole")
    ends = [node for node in (result.producer(), product) if node is not None]
    name = result.name
    result.replace_all_uses_with(whole, replace_graph_outputs=True)
    for node in dict.fromkeys(ends):
        model.graph.remove(node, safe=True)
    whole.name = name


def _untransposed(weight: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """A product's weight, and whether it is transposed first: so is a table that is an embedding as well."""
    node = None if weight is None else weight.producer()
    if node is None or node.op_type != "Transpose" or len(node.outputs[0].shape or ()) != 2:
        return weight, False
    return node.inputs[0], True


def _added_bias(product: ir.Node) -> tuple[ir.Value | None, ir.Value]:
    """The bias that alone is added to a product, and the value after it."""
    result = product.outputs[0]
    users = result.uses()
    if len(users) != 1 or users[0].node.op_type != "Add" or result.is_graph_output():
        return None, result
    addition = users[0].node
    other = addition.inputs[1 - users[0].idx]
    if other is None or not other.is_initializer() or other.shape is None or len(other.shape) != 1:
        return None, result
    return other, addition.outputs[0]


def _paired(model: ir.Model, value: ir.Value, like: ir.Value, before: ir.Node) -> ir.Value:
    """``value`` quantized and restored with the numbers of the activation ``like``."""
    restore = quantizer(like)
    if restore is None or restore.inputs[2] is None:
        raise LoweringError("an activation pair is broken in the ONNX graph", fix="report this as a bug")
    scale, zero = restore.inputs[1], restore.inputs[2]
    name, shape = value.name, value.shape
    integers = insert(model, before, "QuantizeLinear", [value, scale, zero], f"{name}_quantize", zero.dtype, shape)
    return insert(model, before, "DequantizeLinear", [integers, scale, zero], f"{name}_restore", value.dtype, shape)


def _reshaped(model: ir.Model, before: ir.Node, value: ir.Value, sizes: Sequence[int], name: str) -> ir.Value:
    import numpy as np

    target = constant(model, f"{name}_shape", np.array(sizes, dtype=np.int64))
    return insert(model, before, "Reshape", [value, target], name, value.dtype, sizes)


def _drop_unused_transposes(model: ir.Model) -> None:
    for node in list(model.graph):
        if node.op_type == "Transpose" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            model.graph.remove(node, safe=True)
