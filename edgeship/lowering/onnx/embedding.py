"""Embedding tables in ONNX: take the rows while they are integers, then dequantize those rows only.

``DequantizeLinear -> Gather`` would dequantize the whole table at every run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeship.lowering.onnx.edit import constant, insert

if TYPE_CHECKING:
    import onnx_ir as ir


def gather_integers(model: ir.Model, table: ir.Value, numbers: list[ir.Value]) -> None:
    """Rewrite each ``Gather(table, ids)`` along axis 0 to gather integers; other uses of ``table`` stay.

    Args:
        model: edited in place.
        table: the float table, still without content.
        numbers: integers [V, D], scale (scalar or [V]) and, perhaps, zero point. Only 8-bit symmetric tables are
            rewritten, with plain operators; `edgeship.lowering.onnx.blocks` has a form for the others.
    """
    import onnx_ir as ir

    if numbers[0].dtype != ir.DataType.INT8 or len(numbers) > 2 or len(numbers[1].shape or ()) > 1:
        return
    integers, scale = numbers
    for gather in rows_of(table):
        ids, result = gather.inputs[1], gather.outputs[0]
        rows = insert(model, gather, "Gather", [integers, ids], f"{result.name}_q", integers.dtype, result.shape)
        to = int(ir.DataType.FLOAT)
        floats = insert(model, gather, "Cast", [rows], f"{result.name}_cast", result.dtype, result.shape, to=to)
        factor = scale
        if len(scale.shape or ()) == 1:
            shape = list((result.shape or ())[:-1])
            factor = insert(model, gather, "Gather", [scale, ids], f"{result.name}_row_scale", scale.dtype, shape)
            last = _last_axis(model)
            shape = [*shape, 1]
            factor = insert(model, gather, "Unsqueeze", [factor, last], f"{result.name}_factor", scale.dtype, shape)
        product = insert(model, gather, "Mul", [floats, factor], f"{result.name}_rows", result.dtype, result.shape)
        result.replace_all_uses_with(product, replace_graph_outputs=True)
        name = result.name
        model.graph.remove(gather, safe=True)
        product.name = name


def rows_of(table: ir.Value) -> list[ir.Node]:
    """The nodes that take whole rows of a table."""
    return [use.node for use in table.uses() if use.node.op_type == "Gather" and use.idx == 0 and not _axis(use.node)]


def _axis(node: ir.Node) -> int:
    attribute = node.attributes.get("axis")
    return 0 if attribute is None else int(attribute.as_int())


def _last_axis(model: ir.Model) -> ir.Value:
    import numpy as np

    return model.graph.initializers.get("last_axis") or constant(model, "last_axis", np.array([-1], np.int64))
