"""Static activations in ONNX: unsigned integers, int32 biases, and products in the form that runs as integers.

ONNX Runtime's x86 kernels and QNN both take unsigned activations, so int8 becomes uint8 with zero point + 128 and int16
(zero point 0) becomes uint16 with zero point 32768: the same grid, each number one offset higher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeship.errors import LoweringError

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx_ir as ir

    from edgeship.program.program import TorchProgram

OFFSETS = {8: 128, 16: 32768}


def store_activations(model: ir.Model, program: TorchProgram) -> None:
    """Rewrite the exported pairs in place. Raises `LoweringError` when a decided pair is not in the graph."""
    _make_unsigned(model)
    _products_as_gemm(model)
    _store_biases(model, program)
    _guard_softmax(model)
    _check_all_there(model, program)


def _pairs(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "QuantizeLinear"]


def _number(value: ir.Value | None) -> npt.NDArray[Any]:
    import onnx_ir as ir

    constant = None if value is None else ir.convenience.get_const_tensor(value)
    if constant is None:
        raise LoweringError("a quantized activation has no constant scale", fix="report this as a bug")
    array: npt.NDArray[Any] = constant.numpy()
    return array


def _make_unsigned(model: ir.Model) -> None:
    """Give each activation pair its own scale and unsigned zero point initializers, named after the activation."""
    import numpy as np

    for quantize in _pairs(model):
        value, scale, zero = quantize.inputs[0], _number(quantize.inputs[1]), _number(quantize.inputs[2])
        bits = 8 * zero.dtype.itemsize
        unsigned = np.dtype(f"uint{bits}")
        name = value.name if value is not None else quantize.name
        numbers = (
            _constant(model, f"{name}_scale", np.asarray(scale, np.float32)),
            _constant(model, f"{name}_zero", np.asarray(int(zero) + OFFSETS[bits], unsigned)),
        )
        (integers,) = quantize.outputs
        integers.dtype = numbers[1].dtype
        for node in (quantize, *(use.node for use in integers.uses())):
            for index, number in enumerate(numbers, start=1):
                node.replace_input_with(index, number)


def _constant(model: ir.Model, name: str, number: npt.NDArray[Any]) -> ir.Value:
    import onnx_ir as ir

    tensor = ir.tensor(number, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    model.graph.initializers[name] = value
    return value


def _products_as_gemm(model: ir.Model) -> None:
    """``MatMul`` by an encoded weight, ``+ bias``, on rank 3 and more: Reshape, Gemm, Reshape.

    Only Gemm takes the bias in int32, and QNN has per-channel weights for it alone. The Reshapes get pairs with the
    numbers of their neighbours, which changes no value.
    """
    flattened: dict[ir.Value, ir.Value] = {}
    for product in [node for node in model.graph if node.op_type == "MatMul"]:
        x, weight = product.inputs[0], product.inputs[1]
        if _quantizer(x) is None or _stored_scale(weight) is None or weight is None or x is None or x.shape is None:
            continue
        bias, result = _added_bias(product)
        rows, columns = x.shape[-1], (weight.shape or (0, 0))[1]
        inner = flattened.get(x)
        if inner is None:
            inner = flattened[x] = _paired(
                model, _reshaped(model, product, x, (-1, rows), f"{product.name}_rows"), x, product
            )
        gemm = _insert(
            model, product, "Gemm", [inner, weight, *([] if bias is None else [bias])], f"{product.name}_gemm"
        )
        gemm.dtype, gemm.shape = x.dtype, _shape((inner.shape or (0,))[0], columns)
        users = result.uses()
        after = users[0].node if users else None
        if len(users) == 1 and after is not None and after.op_type == "QuantizeLinear" and not result.is_graph_output():
            gemm = _paired(model, gemm, after.outputs[0].uses()[0].node.outputs[0], product)
        whole = _reshaped(model, product, gemm, (*x.shape[:-1], columns), f"{product.name}_whole")
        ends = [node for node in (result.producer(), product) if node is not None]
        result.replace_all_uses_with(whole, replace_graph_outputs=True)
        name = result.name
        for node in dict.fromkeys(ends):
            model.graph.remove(node, safe=True)
        whole.name = name


def _quantizer(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes an activation, or None when the value is not one."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    integers = node.inputs[0]
    return None if integers is None or integers.is_initializer() else node


def _stored_scale(value: ir.Value | None) -> ir.Value | None:
    """The scale of an encoded weight, or None when the value is not one."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    integers = node.inputs[0]
    return node.inputs[1] if integers is not None and integers.is_initializer() else None


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
    restore = _quantizer(like)
    if restore is None:
        raise LoweringError("an activation pair is broken in the ONNX graph", fix="report this as a bug")
    scale, zero = restore.inputs[1], restore.inputs[2]
    integers = _insert(model, before, "QuantizeLinear", [value, scale, zero], f"{value.name}_quantize")
    integers.dtype, integers.shape = None if zero is None else zero.dtype, value.shape
    restored = _insert(model, before, "DequantizeLinear", [integers, scale, zero], f"{value.name}_restore")
    restored.dtype, restored.shape = value.dtype, value.shape
    return restored


def _reshaped(model: ir.Model, before: ir.Node, value: ir.Value, sizes: tuple[Any, ...], name: str) -> ir.Value:
    import numpy as np

    wanted = [int(size) for size in sizes]
    if -1 in wanted:
        total = int(np.prod([int(size) for size in value.shape or ()]))
        wanted[wanted.index(-1)] = total // -int(np.prod(wanted))
    target = _constant(model, f"{name}_shape", np.array(wanted, dtype=np.int64))
    result = _insert(model, before, "Reshape", [value, target], name)
    result.dtype, result.shape = value.dtype, _shape(*wanted)
    return result


def _shape(*sizes: Any) -> ir.Shape:
    import onnx_ir as ir

    return ir.Shape([int(size) for size in sizes])


def _insert(model: ir.Model, before: ir.Node, op: str, inputs: list[ir.Value | None], name: str) -> ir.Value:
    import onnx_ir as ir

    node = ir.node(op, inputs, name=name)
    model.graph.insert_before(before, node)
    node.outputs[0].name = name
    return node.outputs[0]


def _store_biases(model: ir.Model, program: TorchProgram) -> None:
    """int32 bias with scale ``s_x * s_w`` wherever activation and weight of a convolution or Gemm are both integers.

    A bias that does not fit 31 bits at that scale stays float32: that layer then runs in float, and right.
    """
    import numpy as np

    for node in list(model.graph):
        if node.op_type not in ("Conv", "Gemm", "ConvTranspose") or len(node.inputs) < 3:
            continue
        restore, weight_scale, bias = _quantizer(node.inputs[0]), _stored_scale(node.inputs[1]), node.inputs[2]
        if (
            restore is None
            or weight_scale is None
            or bias is None
            or not bias.is_initializer()
            or bias.const_value is None
        ):
            continue
        scales = np.float32(_number(restore.inputs[1])) * _number(weight_scale)
        if scales.ndim > 1:
            continue
        integers = np.rint(bias.const_value.numpy().astype(np.float64) / scales.astype(np.float64))
        if np.abs(integers).max(initial=0) >= 2**31:
            continue
        stem = bias.name if len(bias.uses()) == 1 else f"{bias.name}_{node.name}"
        inputs: list[ir.Value | None] = [
            _constant(model, f"{stem}_q", integers.astype(np.int32)),
            _constant(model, f"{stem}_scale", scales),
            _constant(model, f"{stem}_zero", np.zeros(scales.shape, np.int32)),
        ]
        restored = _insert(model, node, "DequantizeLinear", inputs, f"{stem}_restore")
        if scales.ndim:
            _set_axis(restored, 0)
        restored.dtype, restored.shape = bias.dtype, bias.shape
        node.replace_input_with(2, restored)
        if not bias.uses() and bias.name is not None:
            del model.graph.initializers[bias.name]


def _set_axis(value: ir.Value, axis: int) -> None:
    import onnx_ir as ir

    node = value.producer()
    if node is not None:
        node.attributes["axis"] = ir.AttrInt64("axis", axis)


def _guard_softmax(model: ir.Model) -> None:
    """Keep ONNX Runtime from fusing an 8-bit softmax where its QLinearSoftmax is silently wrong (seen in 1.31.1).

    It divides in 32 bits and wraps around below a scale of 1/256 (0.85 becomes 0.45), and over a single element below
    1/128 (1 becomes 0). A Min a quarter step below the top of the grid changes no integer, and stays in the graph.
    """
    import numpy as np

    for quantize in _pairs(model):
        value = quantize.inputs[0]
        node = None if value is None else value.producer()
        scale, zero = _number(quantize.inputs[1]), _number(quantize.inputs[2])
        if value is None or node is None or node.op_type != "Softmax" or zero.dtype != np.uint8:
            continue
        axis = node.attributes.get("axis")
        size = (value.shape or (1,))[-1 if axis is None else axis.as_int()]
        if scale >= (1 / 128 if size == 1 else 1 / 256):
            continue
        top = _constant(model, f"{value.name}_top", np.asarray((254.75 - int(zero)) * scale, np.float32))
        capped = _insert(model, quantize, "Min", [value, top], f"{value.name}_capped")
        capped.dtype, capped.shape = value.dtype, value.shape
        quantize.replace_input_with(0, capped)


def _check_all_there(model: ir.Model, program: TorchProgram) -> None:
    """Every decided scale and zero point is in the graph."""
    import numpy as np

    there = {
        (
            float(_number(node.inputs[1])),
            int(_number(node.inputs[2])) - OFFSETS[8 * _number(node.inputs[2]).dtype.itemsize],
        )
        for node in _pairs(model)
    }
    for name, encoding in program.activations.items():
        if (float(np.float32(encoding.scale)), encoding.zero_point) not in there:
            raise LoweringError(f"the activation {name} lost its scale in the ONNX graph", fix="report this as a bug")
