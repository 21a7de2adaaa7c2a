"""Linear layers with a scale a group on Hexagon: a unit for each channel, times an integer from 1 to 15.

QNN computes such a product in 4 bits when its scales come as two factors (LPBQ, ``BLOCKWISE_EXPANSION``):

    DequantizeLinear(steps uint8, unit) -> scales;  DequantizeLinear(integers int4, scales, zeros) -> MatMul

The zeros must be there: without them the provider takes the weight for another type and leaves it on the CPU. Gemm is
no way: without a bias it stays on the CPU, with one it answers wrongly (onnxruntime-qnn 2.7.0). Any other scales QNN
would approximate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeship.errors import EncodingError

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    from edgeship.lowering.qnn.graph import Graph

    Array = npt.NDArray[Any]

MAX_STEP = 15
TOP = 32767
MIDDLE = 32768


def split_block_scales(graph: Graph) -> int:
    """Rewrite every product by a weight in groups, in place. Returns how many.

    Raises `EncodingError` when the scales of a weight are no such products, or something else reads it.
    """
    changed = 0
    for node in graph.nodes:
        for place, name in enumerate(node.input):
            restore = graph.made_by.get(name)
            if restore is None or restore.op_type != "DequantizeLinear" or not _block_size(restore):
                continue
            if node.op_type not in ("Gemm", "MatMul") or place != 1 or _setting(restore, "axis", 1) != 0:
                raise EncodingError(
                    f"Hexagon has no groups for {restore.input[0]}, which {node.op_type} reads",
                    fix="use one scale a channel",
                )
            _rewrite(graph, node, restore)
            changed += 1
    return changed


def factors(scale: Array, name: str = "weight") -> tuple[Array, Array]:
    """Group scales (G, N) as float32 units (N,) and uint8 steps (G, N) from 1 to 15, exactly.

    Raises `EncodingError` when they are no such products.
    """
    import numpy as np

    wide = scale.astype(np.float64)
    unit = np.zeros(wide.shape[1])
    for step in range(MAX_STEP, 0, -1):
        # The largest unit that float32 holds, and of which all scales are multiples.
        candidate = (wide.min(axis=0) / step).astype(np.float32).astype(np.float64)
        ratio = wide / candidate
        unit = np.where(((ratio == ratio.round()) & (ratio <= MAX_STEP)).all(axis=0), candidate, unit)
    if not unit.all():
        raise EncodingError(
            f"the group scales of {name} are not 1 to {MAX_STEP} times a unit a channel, which Hexagon wants",
            fix="quantize with the npu_block option, or use one scale a channel",
        )
    return unit.astype(np.float32), (wide / unit).astype(np.uint8)


def _rewrite(graph: Graph, product: onnx.NodeProto, restore: onnx.NodeProto) -> None:
    import numpy as np

    stored, result = restore.input[0], product.output[0]
    unit, steps = factors(graph.array(restore.input[1]), stored)
    numbers = [
        graph.constant(f"{stored}_steps", steps),
        graph.constant(f"{stored}_unit", unit),
        graph.constant(f"{stored}_unit_zero", np.zeros(unit.shape, np.uint8)),
    ]
    scales = graph.add(product, "DequantizeLinear", numbers, f"{result}_scales", axis=1)
    inputs = [stored, scales, restore.input[2]]
    size = _block_size(restore)
    weight = graph.add(product, "DequantizeLinear", inputs, f"{result}_weight", axis=0, block_size=size)
    value = graph.add(product, "MatMul", [product.input[0], weight], f"{result}_product")
    if product.op_type == "Gemm" and len(product.input) > 2 and product.input[2]:
        value = _with_bias(graph, product, value)
    graph.replace(product, value)


def _with_bias(graph: Graph, product: onnx.NodeProto, value: str) -> str:
    """Add the bias in 16 bits, after a rounding of the product to a grid that reaches any sum on the result's grid.

    What lies beyond that grid would be clipped after the sum as well.
    """
    import numpy as np

    bias, result = graph.array(product.input[2]), product.output[0]
    top = _reach(graph, result) + float(np.abs(bias).max())
    middle = graph.constant("blocks_middle", np.array(MIDDLE, np.uint16))
    rounded = graph.pair(product, value, graph.constant(f"{result}_grid", np.array(top / TOP, np.float32)), middle)
    step = np.float32(max(float(np.abs(bias).max()), 1e-30) / TOP)
    grid = graph.constant(f"{result}_bias_grid", np.array(step))
    integers = graph.constant(f"{result}_bias", (np.rint(bias / step) + MIDDLE).astype(np.uint16))
    term = graph.add(product, "DequantizeLinear", [integers, grid, middle], f"{result}_bias_restored")
    return graph.add(product, "Add", [rounded, term], f"{result}_sum")


def _reach(graph: Graph, name: str) -> float:
    """The largest number on the grid to which a value, clipped perhaps, is quantized."""
    for node in graph.nodes:
        if name in node.input:
            if node.op_type == "QuantizeLinear":
                zero = int(graph.array(node.input[2]))
                return float(graph.array(node.input[1])) * max(zero, 2 * MIDDLE - 1 - zero)
            if node.op_type in ("Relu", "Clip", "Min", "Max"):
                return _reach(graph, node.output[0])
    raise EncodingError(f"the sum {name} of a product in groups has no grid", fix="use one scale a channel")


def _block_size(node: onnx.NodeProto) -> int:
    return _setting(node, "block_size", 0)


def _setting(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)
