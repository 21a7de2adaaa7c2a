"""Products by a transposed weight, as torch's linear layers are exported: ``Transpose -> MatMul``, or Gemm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def is_linear(value: ir.Value) -> bool:
    """Whether every use of a weight [N, K] is such a product."""
    uses = value.uses()
    return (
        value.shape is not None
        and len(value.shape) == 2
        and bool(uses)
        and all(is_product(use.node, use.idx) for use in uses)
    )


def is_product(node: ir.Node, index: int) -> bool:
    """Whether a use of a weight is a Gemm by its transpose, or a Transpose that only products read."""
    if node.op_type == "Gemm":
        return index == 1 and _integer(node, "transB") == 1 and _integer(node, "transA") == 0
    if node.op_type != "Transpose":
        return False
    perm = node.attributes.get("perm")
    users = node.outputs[0].uses()
    swaps = perm is None or list(perm.as_ints()) == [1, 0]
    return swaps and all(use.node.op_type == "MatMul" and use.idx == 1 for use in users)


def products_of(uses: Iterable[ir.Node]) -> list[ir.Node]:
    """The products themselves: MatMul behind a Transpose, or Gemm."""
    found: list[ir.Node] = []
    for node in uses:
        found += [node] if node.op_type == "Gemm" else [use.node for use in node.outputs[0].uses()]
    return found


def untranspose(model: ir.Model, value: ir.Value) -> None:
    """Drop the transposition at every use, and swap the value's own axes instead."""
    import onnx_ir as ir

    for use in value.uses():
        if use.node.op_type == "Gemm":
            use.node.attributes["transB"] = ir.AttrInt64("transB", 0)
        else:
            use.node.outputs[0].replace_all_uses_with(value)
            model.graph.remove(use.node, safe=True)
    shape = value.shape
    value.shape = ir.Shape([shape[1], shape[0]]) if shape is not None else None


def _integer(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else int(attribute.as_int())
