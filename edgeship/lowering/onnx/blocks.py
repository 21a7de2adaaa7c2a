"""Weights of linear layers and embeddings as ``MatMulNBits`` and ``GatherBlockQuantized``: ONNX Runtime's operators.

ONNX Runtime makes the same nodes of ``DequantizeLinear -> MatMul`` while it loads, but then rounds activations to int8
unless the app sets an option, and mistakes some sizes (see docs/decisions/0007). Written as nodes, the arithmetic is in
the file. A weight [N, K] is stored row by row, low bits first, in blocks padded to the block size:

    integers  uint8 [N, blocks, block_size * bits / 8], symmetric ones offset by ``2**(bits - 1)``
    scales    float16 [N, blocks], or [N, 1] or [1, 1] spread over the blocks at load
    zeros     uint8 [N, blocks * bits / 8], or one byte a row or tensor that repeats the number, spread at load
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from edgeship.core.weights import AffineTensor
from edgeship.lowering.onnx.edit import constant, insert, made_later, scales
from edgeship.lowering.onnx.embedding import rows_of
from edgeship.lowering.onnx.linear import is_product, products_of

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx_ir as ir

    from edgeship.core.forms import ActivationMode
    from edgeship.core.weights import EncodedTensor

    Array = npt.NDArray[Any]

DOMAIN = "com.microsoft"
# Weights are packed this many numbers at a time: a table of 128k tokens takes a gigabyte on the way otherwise.
CHUNK_ELEMENTS = 1 << 20
BLOCK_SIZES = (256, 128, 64, 32, 16)
# Blocks of scales that reach further than a block: the largest that divides; some padding where none does.
FREE_BLOCK_SIZES = (128, 64, 32)
RAGGED_BLOCK_SIZE = 16
# How the kernels treat activations: 1 leaves them in float32, 4 rounds them to int8 while running.
ACCURACY_LEVELS = {"float": 1, "dynamic": 4}


@dataclass(frozen=True)
class Blocks:
    """A weight as the operators want it. ``bits`` is that of the container: 2, 4 or 8."""

    tensor: AffineTensor
    bits: int
    size: int

    @property
    def count(self) -> int:
        """Blocks a row."""
        return -(-self.tensor.shape[1] // self.size)

    def integers(self) -> Array:
        """Packed integers, the padding at the zero point."""
        import numpy as np

        rows = self.tensor.shape[0]
        result = np.empty((rows, self.count, self.size * self.bits // 8), np.uint8)
        step = max(1, CHUNK_ELEMENTS // (self.count * self.size))
        for start in range(0, rows, step):
            result[start : start + step] = self._rows(start, min(rows, start + step))
        return result

    def _rows(self, start: int, stop: int) -> Array:
        import numpy as np

        columns, width = self.tensor.shape[1], self.count * self.size
        values, zero = self.tensor.values[start:stop], self.tensor.zero_point
        if zero is None:
            middle = np.uint8(1 << (self.bits - 1))
            padded = np.full((stop - start, width), middle, np.uint8)
            # In eight bits with the carry dropped, which is the sum: it lies between 0 and 255.
            padded[:, :columns] = values.view(np.uint8) + middle
        else:
            last = zero[:1, -1:] if zero.shape[0] == 1 else zero[start:stop, -1:]
            padded = np.broadcast_to(last, (stop - start, width)).astype(np.uint8)
            padded[:, :columns] = values
        return packed(padded, self.bits).reshape(stop - start, self.count, -1)

    def zeros(self) -> Array | None:
        """Packed zero points; None for a symmetric weight."""
        import numpy as np

        zero = self.tensor.zero_point
        if zero is None:
            return None
        each = 8 // self.bits
        if zero.shape[1] == 1:
            return packed(np.repeat(zero, each, axis=1), self.bits)
        return packed(np.pad(zero, ((0, 0), (0, -zero.shape[1] % each))), self.bits)


def as_blocks(tensor: AffineTensor) -> Blocks | None:
    """The weight in blocks; None when the operators have no such scales."""
    if len(tensor.shape) != 2 or tensor.scale.shape[0] not in (1, tensor.shape[0]):
        return None
    columns, spread = tensor.shape[1], tensor.scale.shape[1]
    bits = 4 if tensor.encoding.bits == 3 else tensor.encoding.bits
    if spread > 1:
        size = columns // spread
        return Blocks(tensor, bits, size) if size in BLOCK_SIZES and tensor.scale.shape[0] > 1 else None
    fitting = (size for size in FREE_BLOCK_SIZES if columns % size == 0)
    return Blocks(tensor, bits, next(fitting, RAGGED_BLOCK_SIZE))


def store_blocks(
    model: ir.Model,
    value: ir.Value,
    name: str,
    tensor: AffineTensor,
    encoded: Mapping[str, EncodedTensor],
    activations: ActivationMode,
) -> str | None:
    """Rewrite every use of a weight to read blocks, if each has such an operator.

    Args:
        encoded: holds ``tensor`` under ``name``; read again when the file is written: one is in memory at a time.

    Returns:
        The name of the integers; None when nothing was changed.
    """
    blocks = as_blocks(tensor)
    uses = value.uses()
    lookups = rows_of(value)
    products = [use.node for use in uses if is_product(use.node, use.idx)]
    if blocks is None or not uses or len(lookups) + len(products) < len(uses):
        return None
    if not products and tensor.encoding.bits == 8 and tensor.zero_point is None and tensor.scale.shape[1] == 1:
        return None  # Plain operators do it; see `edgeship.lowering.onnx.embedding`.
    if products and tensor.encoding.bits == 8 and activations != "dynamic":
        return None  # Slower than float32 by far; see `edgeship.lowering.onnx.options`.
    whole = tensor.shape[1] * blocks.bits % 8 == 0 and (not products or tensor.shape[1] % blocks.size == 0)
    if lookups and not whole:
        return None
    import numpy as np
    import onnx_ir as ir

    model.graph.opset_imports[DOMAIN] = 1
    rows, columns = tensor.shape
    width = blocks.size * blocks.bits // 8
    # Lookups alone take rows without padding.
    shape = (rows, blocks.count, width) if products else (rows, columns * blocks.bits // 8)

    def integers() -> Array:
        again = as_blocks(cast("AffineTensor", encoded[name]))
        assert again is not None
        return _cut(again.integers(), shape)

    stored = made_later(model, f"{name}_q", integers, ir.DataType.UINT8, shape)
    readers = {use.node for use in uses}
    first = next(node for node in model.graph if node in readers)
    factor = scales(model, first, f"{name}_scale", tensor.scale)
    if tensor.scale.shape != (rows, blocks.count):
        factor = _spread(model, first, factor, f"{name}_scales", (rows, blocks.count))
    zeros, zero = blocks.zeros(), None
    if zeros is not None:
        zero = constant(model, f"{name}_zero", zeros)
        row = -(-blocks.count * blocks.bits // 8)
        if zeros.shape != (rows, row):
            zero = _spread(model, first, zero, f"{name}_zeros", (rows, row))
    settings = {"bits": blocks.bits, "block_size": blocks.size}
    table = stored
    if lookups and products:
        target = constant(model, f"{name}_rows_shape", np.array([rows, -1], np.int64))
        whole_row = (rows, blocks.count * width)
        table = insert(model, first, "Reshape", [stored, target], f"{name}_rows", stored.dtype, whole_row)
    for gather in lookups:
        inputs = [table, gather.inputs[1], factor, *([] if zero is None else [zero])]
        _replace(model, gather, "GatherBlockQuantized", inputs, gather_axis=0, quantize_axis=1, **settings)
    for product in products_of(products):
        bias = product.inputs[2] if len(product.inputs) > 2 else None
        inputs = [product.inputs[0], stored, factor, zero, *([] if bias is None else [None, bias])]
        level = ACCURACY_LEVELS.get(activations, 1)
        _replace(model, product, "MatMulNBits", inputs, K=columns, N=rows, accuracy_level=level, **settings)
    for node in products:
        if node.op_type == "Transpose":
            model.graph.remove(node, safe=True)
    return str(stored.name)


def _cut(integers: Array, shape: tuple[int, ...]) -> Array:
    """Rows as long as ``shape`` has them."""
    if integers.ndim == len(shape):
        return integers
    return integers.reshape(shape[0], -1)[:, : shape[1]]


def packed(values: Array, bits: int) -> Array:
    """Unsigned integers along the last axis, ``8 / bits`` a byte, the first in the lowest bits."""
    import numpy as np

    each = 8 // bits
    parts = values.astype(np.uint8, copy=False).reshape(*values.shape[:-1], -1, each)
    # A column at a time: numpy reduces so short an axis ten times as slowly.
    result: Array = parts[..., 0].copy()
    for place in range(1, each):
        result |= parts[..., place] << np.uint8(place * bits)
    return result


def _spread(model: ir.Model, before: ir.Node, value: ir.Value, name: str, shape: tuple[int, int]) -> ir.Value:
    """Repeat numbers to ``shape``: ONNX Runtime does it once, at load."""
    import numpy as np

    target = constant(model, f"{name}_shape", np.array(shape, np.int64))
    return insert(model, before, "Expand", [value, target], name, value.dtype, shape)


def _replace(model: ir.Model, node: ir.Node, op: str, inputs: list[ir.Value | None], **settings: int) -> None:
    """Put an operator of ``DOMAIN`` where ``node`` was, with its result under the same name."""
    import onnx_ir as ir

    while inputs and inputs[-1] is None:
        inputs.pop()
    result = node.outputs[0]
    made = ir.node(op, inputs, settings, domain=DOMAIN, name=f"{node.name}_blocks")
    model.graph.insert_before(node, made)
    (output,) = made.outputs
    output.dtype, output.shape = result.dtype, result.shape
    name = result.name
    result.replace_all_uses_with(output, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    output.name = name
