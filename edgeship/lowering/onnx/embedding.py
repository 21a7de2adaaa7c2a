"""Embedding tables in ONNX: take the rows while they are integers, then dequantize those rows only.

``DequantizeLinear -> Gather`` would dequantize the whole table at every run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def gather_integers(model: ir.Model, table: ir.Value, numbers: list[ir.Value]) -> None:
    """Rewrite each ``Gather(table, ids)`` along axis 0 to gather integers; other uses of ``table`` stay.

    Args:
        model: edited in place.
        table: the float table, still without content.
        numbers: integers [V, D], scale (scalar or [V]) and, perhaps, zero point. Only 8-bit symmetric tables are
            rewritten: ONNX Runtime gathers no 4-bit integers.
    """
    import onnx_ir as ir

    if numbers[0].dtype != ir.DataType.INT8 or len(numbers) > 2 or len(numbers[1].shape or ()) > 1:
        return
    integers, scale = numbers
    for use in table.uses():
        gather = use.node
        if gather.op_type != "Gather" or use.idx != 0 or _axis(gather) != 0:
            continue
        ids, result = gather.inputs[1], gather.outputs[0]
        rows = _after(model, gather, "Gather", [integers, ids], f"{result.name}_q", integers.dtype, result.shape)
        floats = _after(model, gather, "Cast", [rows], f"{result.name}_cast", result.dtype, result.shape)
        floats.producer().attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))  # type: ignore[union-attr]
        factor = scale
        if len(scale.shape or ()) == 1:
            shape = ir.Shape(list((result.shape or ())[:-1]))
            factor = _after(model, gather, "Gather", [scale, ids], f"{result.name}_scale", scale.dtype, shape)
            last = _last_axis(model)
            shape = ir.Shape([*shape, 1])
            factor = _after(model, gather, "Unsqueeze", [factor, last], f"{result.name}_factor", scale.dtype, shape)
        product = _after(model, gather, "Mul", [floats, factor], f"{result.name}_rows", result.dtype, result.shape)
        result.replace_all_uses_with(product, replace_graph_outputs=True)
        name = result.name
        model.graph.remove(gather, safe=True)
        product.name = name


def _axis(node: ir.Node) -> int:
    attribute = node.attributes.get("axis")
    return 0 if attribute is None else int(attribute.as_int())


def _after(
    model: ir.Model,
    before: ir.Node,
    op: str,
    inputs: list[ir.Value | None],
    name: str,
    dtype: ir.DataType | None,
    shape: ir.Shape | None,
) -> ir.Value:
    import onnx_ir as ir

    node = ir.node(op, inputs, name=name)
    model.graph.insert_before(before, node)
    (output,) = node.outputs
    output.name, output.dtype, output.shape = name, dtype, shape
    return output


def _last_axis(model: ir.Model) -> ir.Value:
    import numpy as np
    import onnx_ir as ir

    name = "last_axis"
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.array([-1], np.int64), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        model.graph.initializers[name] = value
    return model.graph.initializers[name]
