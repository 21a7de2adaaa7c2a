"""Static activations in ONNX: unsigned integers, int32 biases, and products in the form that runs as integers.

ONNX Runtime's x86 kernels and QNN both take unsigned activations, so int8 becomes uint8 with zero point + 128 and int16
(zero point 0) becomes uint16 with zero point 32768: the same grid, each number one offset higher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeship.errors import LoweringError
from edgeship.lowering.onnx.edit import constant, insert, number, quantizer, weight_scale
from edgeship.lowering.onnx.folds import drop_idle_clips
from edgeship.lowering.onnx.products import products_as_gemm

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.program.program import TorchProgram

OFFSETS = {8: 128, 16: 32768}


def store_activations(model: ir.Model, program: TorchProgram) -> None:
    """Rewrite the exported pairs in place. Raises `LoweringError` when a decided pair is not in the graph."""
    from onnx_ir.passes import common

    _make_unsigned(model)
    drop_idle_clips(model)
    products_as_gemm(model)
    _store_biases(model, program)
    _guard_softmax(model)
    _keep_floats(model)
    common.RemoveUnusedNodesPass()(model)
    _check_all_there(model, program)


def _pairs(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "QuantizeLinear"]


def _make_unsigned(model: ir.Model) -> None:
    """Give each activation pair its own scale and unsigned zero point initializers, named after the activation."""
    import numpy as np

    for quantize in _pairs(model):
        value, scale, zero = quantize.inputs[0], number(quantize.inputs[1]), number(quantize.inputs[2])
        bits = 8 * zero.dtype.itemsize
        unsigned = np.dtype(f"uint{bits}")
        name = value.name if value is not None else quantize.name
        numbers = (
            constant(model, f"{name}_scale", np.asarray(scale, np.float32)),
            constant(model, f"{name}_zero", np.asarray(int(zero) + OFFSETS[bits], unsigned)),
        )
        (integers,) = quantize.outputs
        integers.dtype = numbers[1].dtype
        for node in (quantize, *(use.node for use in integers.uses())):
            for index, ours in enumerate(numbers, start=1):
                node.replace_input_with(index, ours)


def _store_biases(model: ir.Model, program: TorchProgram) -> None:
    """int32 bias with scale ``s_x * s_w`` wherever activation and weight of a convolution or Gemm are both integers.

    A bias that does not fit 31 bits at that scale stays float32: that layer then runs in float, and right.
    """
    import numpy as np

    for node in list(model.graph):
        if node.op_type not in ("Conv", "Gemm", "ConvTranspose") or len(node.inputs) < 3:
            continue
        restore, scale, bias = quantizer(node.inputs[0]), weight_scale(node.inputs[1]), node.inputs[2]
        if restore is None or scale is None or bias is None or bias.const_value is None:
            continue
        scales = np.float32(number(restore.inputs[1])) * number(scale)
        if scales.ndim > 1:
            continue
        integers = np.rint(bias.const_value.numpy().astype(np.float64) / scales.astype(np.float64))
        if np.abs(integers).max(initial=0) >= 2**31:
            continue
        stem = bias.name if len(bias.uses()) == 1 else f"{bias.name}_{node.name}"
        inputs: list[ir.Value | None] = [
            constant(model, f"{stem}_q", integers.astype(np.int32)),
            constant(model, f"{stem}_scale", scales),
            constant(model, f"{stem}_zero", np.zeros(scales.shape, np.int32)),
        ]
        axis = {"axis": 0} if scales.ndim else {}
        name = f"{stem}_restore"
        restored = insert(model, node, "DequantizeLinear", inputs, name, bias.dtype, bias.shape, **axis)
        node.replace_input_with(2, restored)
        if not bias.uses() and bias.name is not None:
            del model.graph.initializers[bias.name]


def _guard_softmax(model: ir.Model) -> None:
    """Keep ONNX Runtime from fusing an 8-bit softmax where its QLinearSoftmax is silently wrong (seen in 1.31.1).

    It divides in 32 bits and wraps around below a scale of 1/256 (0.85 becomes 0.45), and over a single element below
    1/128 (1 becomes 0). A Min a quarter step below the top of the grid changes no integer, and stays in the graph.
    """
    import numpy as np

    for quantize in _pairs(model):
        value = quantize.inputs[0]
        node = None if value is None else value.producer()
        scale, zero = number(quantize.inputs[1]), number(quantize.inputs[2])
        if value is None or node is None or node.op_type != "Softmax" or zero.dtype != np.uint8:
            continue
        axis = node.attributes.get("axis")
        size = (value.shape or (1,))[-1 if axis is None else axis.as_int()]
        if scale >= (1 / 128 if size == 1 else 1 / 256):
            continue
        top = constant(model, f"{value.name}_top", np.asarray((254.75 - int(zero)) * scale, np.float32))
        capped = insert(model, quantize, "Min", [value, top], f"{value.name}_capped", value.dtype, value.shape)
        quantize.replace_input_with(0, capped)


def _keep_floats(model: ir.Model) -> None:
    """Keep ONNX Runtime from rounding float weights to int8, per tensor, between static activations (seen in 1.31.1).

    It does so behind a DequantizeLinear with one scale; repeated for every channel, the same scale is left alone.
    """
    import numpy as np

    for node in list(model.graph):
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        x, weight = node.inputs[0], node.inputs[1]
        restore = quantizer(x)
        if x is None or x.shape is None or restore is None or not _is_float_constant(weight):
            continue
        axis = 1 if node.op_type.startswith("Conv") else len(x.shape) - 1
        numbers = [
            constant(model, f"{x.name}_{ending}", np.repeat(number(value), int(x.shape[axis])))
            for ending, value in zip(("scales", "zeros"), restore.inputs[1:3], strict=True)
        ]
        inputs = [restore.inputs[0], *numbers]
        name = f"{x.name}_{node.name}"
        node.replace_input_with(0, insert(model, node, "DequantizeLinear", inputs, name, x.dtype, x.shape, axis=axis))


def _is_float_constant(value: ir.Value | None) -> bool:
    """Whether a value is a weight in float32, or in float16 behind a Cast, transposed perhaps."""
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type not in ("Cast", "Transpose"):
            return False
        value = node.inputs[0]
    return value is not None


def _check_all_there(model: ir.Model, program: TorchProgram) -> None:
    """Every decided scale and zero point is in the graph."""
    import numpy as np

    there = {
        (
            float(number(node.inputs[1])),
            int(number(node.inputs[2])) - OFFSETS[8 * number(node.inputs[2]).dtype.itemsize],
        )
        for node in _pairs(model)
    }
    for name, encoding in program.activations.items():
        if (float(np.float32(encoding.scale)), encoding.zero_point) not in there:
            raise LoweringError(f"the activation {name} lost its scale in the ONNX graph", fix="report this as a bug")
