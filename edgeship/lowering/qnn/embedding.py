"""Embedding tables on Hexagon: looked up as 8-bit integers, scaled afterwards.

Hexagon gathers integers, but only on one grid for table and rows. So the rows are gathered on a grid of their own and
then brought to the activation's:

    one scale:          Gather(int8) -> requantize
    one scale a row:    Gather(int8, scale 1) * Gather(row scales in uint16)

Row scales are float16 numbers; as multiples of a power of two they fit 16 bits, exactly, when they lie within 32:1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgeship.errors import EncodingError

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    from edgeship.lowering.qnn.graph import Graph

    Array = npt.NDArray[Any]

UINT16_MIDDLE = 32768


def lookup_integers(graph: Graph) -> int:
    """Rewrite every lookup in a dequantized table, in place. Returns how many.

    Raises `EncodingError` when the row scales of a table do not fit 16 bits exactly.
    """
    changed = 0
    for gather in [node for node in graph.nodes if node.op_type == "Gather"]:
        table = graph.made_by.get(gather.input[0])
        if table is None or table.op_type != "DequantizeLinear" or table.input[0] not in graph.constants:
            continue
        if graph.array(table.input[0]).dtype.kind == "u":
            continue  # a constant quantized as an activation
        scale = graph.array(table.input[1])
        if scale.size == 1:
            _requantized(graph, gather, table)
        else:
            _scaled(graph, gather, table, scale)
        changed += 1
    return changed


def _requantized(graph: Graph, gather: onnx.NodeProto, table: onnx.NodeProto) -> None:
    """Gather -> (table's grid) -> what read the rows; the activation's own pair follows."""
    rows = graph.add(gather, "Gather", list(gather.input), f"{gather.output[0]}_lookup_rows", axis=0)
    restored = graph.pair(gather, rows, table.input[1], table.input[2])
    graph.replace(gather, restored)


def _scaled(graph: Graph, gather: onnx.NodeProto, table: onnx.NodeProto, scale: Array) -> None:
    import numpy as np

    stored, ids = table.input[0], gather.input[1]
    multiples, unit = row_multiples(scale, stored)
    if any(table.output[0] in node.input for node in graph.nodes if node is not gather):
        # A tied head reads it with scales: QNN has one grid a constant, and would silently take the lookup's for both.
        stored = graph.constant(f"{stored}_lookup", graph.array(stored))
    one = graph.constant(f"{stored}_lookup_one", np.array(1.0, np.float32))
    zero = graph.constant(f"{stored}_lookup_zero8", np.array(0, np.int8))
    fine = graph.constant(f"{stored}_lookup_fine", np.array(1 / 256, np.float32))
    middle = graph.constant(f"{stored}_lookup_middle", np.array(UINT16_MIDDLE, np.uint16))
    integers = graph.add(gather, "DequantizeLinear", [stored, one, zero], f"{gather.output[0]}_lookup_integers")
    rows = graph.add(gather, "Gather", [integers, ids], f"{gather.output[0]}_lookup_rows", axis=0)
    wide = graph.pair(gather, graph.pair(gather, rows, one, zero), fine, middle)
    units = graph.constant(f"{stored}_lookup_multiples", multiples.reshape(-1, 1))
    unit_name = graph.constant(f"{stored}_lookup_unit", np.array(unit, np.float32))
    bottom = graph.constant(f"{stored}_lookup_bottom", np.array(0, np.uint16))
    scales = graph.add(gather, "DequantizeLinear", [units, unit_name, bottom], f"{gather.output[0]}_lookup_scales")
    picked = graph.add(gather, "Gather", [scales, ids], f"{gather.output[0]}_lookup_scale", axis=0)
    factor = graph.pair(gather, picked, unit_name, bottom)
    product = graph.add(gather, "Mul", [wide, factor], f"{gather.output[0]}_lookup_product")
    # 16 bits whatever the activation has: one rounding of the product, then the activation's own pair.
    reach = graph.constant(f"{stored}_lookup_reach", np.array(127 * float(scale.max()) / 32767, np.float32))
    graph.replace(gather, graph.pair(gather, product, reach, middle))


def row_multiples(scale: Array, name: str) -> tuple[Array, float]:
    """Row scales as ``multiples * unit`` with ``unit`` a power of two: (uint16 multiples, unit)."""
    import numpy as np

    unit = 2.0 ** math.ceil(math.log2(float(scale.max()) / 65535))
    multiples = scale.astype(np.float64).reshape(-1) / unit
    if not np.array_equal(multiples, np.round(multiples)):
        raise EncodingError(
            f"the row scales of {name} span more than 32:1, and Hexagon keeps them in 16 bits",
            fix="quantize the embedding per tensor",
        )
    return multiples.astype(np.uint16), unit
