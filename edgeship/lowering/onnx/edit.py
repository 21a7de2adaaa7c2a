"""Put nodes and constants into an ONNX graph, with names, types and shapes set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeship.errors import LoweringError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt
    import onnx_ir as ir


def insert(
    model: ir.Model,
    before: ir.Node,
    op: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    dtype: ir.DataType | None,
    shape: Iterable[Any] | None,
    **integers: int,
) -> ir.Value:
    """A new node that runs before ``before``; returns its output. ``integers`` become attributes."""
    import onnx_ir as ir

    node = ir.node(op, inputs, integers, name=name)
    model.graph.insert_before(before, node)
    (output,) = node.outputs
    output.name, output.dtype = name, dtype
    output.shape = None if shape is None else ir.Shape(list(shape))
    return output


def constant(model: ir.Model, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """An initializer, under ``name`` or, when that is taken, the next free one. Any shape."""
    import onnx_ir as ir

    name = free_name(model, name)
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    model.graph.initializers[name] = value
    return value


def made_later(
    model: ir.Model, name: str, make: Callable[[], npt.NDArray[Any]], dtype: ir.DataType, shape: Sequence[int]
) -> ir.Value:
    """An initializer whose content is made when the file is written, so that one weight is in memory at a time.

    ``make`` gives an array of that shape.
    """
    import onnx_ir as ir

    name = free_name(model, name)
    tensor = lazy_tensor(name, make, dtype, shape)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
    model.graph.initializers[name] = value
    return value


def lazy_tensor(
    name: str, make: Callable[[], npt.NDArray[Any]], dtype: ir.DataType, shape: Sequence[int]
) -> ir.LazyTensor:
    """A tensor made each time that it is read. ``make`` gives an array of that shape."""
    import numpy as np
    import onnx_ir as ir

    def read() -> ir.Tensor:
        """The array in the announced shape and type."""
        array = np.ascontiguousarray(make()).astype(dtype.numpy(), copy=False)
        return ir.Tensor(array.reshape(tuple(shape)), dtype=dtype, name=name)

    return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=name)


def scales(model: ir.Model, before: ir.Node, name: str, scale: npt.NDArray[Any]) -> ir.Value:
    """Scales in float32, stored as float16 where that holds the same numbers; a Cast that is folded at load.

    Any shape.
    """
    import numpy as np
    import onnx_ir as ir

    half = scale.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), scale):
        return constant(model, name, np.ascontiguousarray(scale, np.float32))
    stored = constant(model, name, np.ascontiguousarray(half))
    to = int(ir.DataType.FLOAT)
    return insert(model, before, "Cast", [stored], f"{stored.name}_f32", ir.DataType.FLOAT, scale.shape, to=to)


def free_name(model: ir.Model, name: str) -> str:
    """``name``, with underscores after it while an initializer has it already."""
    while name in model.graph.initializers:
        name += "_"
    return name


def number(value: ir.Value | None) -> npt.NDArray[Any]:
    """The content of a constant. Raises `LoweringError` when it is none. Any shape."""
    import onnx_ir as ir

    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise LoweringError("a quantized activation has no constant scale", fix="report this as a bug")
    array: npt.NDArray[Any] = tensor.numpy()
    return array


def quantizer(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes an activation, or None when the value is not one."""
    node = _dequantize(value)
    return None if node is None or _stored(node) else node


def weight_scale(value: ir.Value | None) -> ir.Value | None:
    """The scale of an encoded weight, or None when the value is not one."""
    node = _dequantize(value)
    return node.inputs[1] if node is not None and _stored(node) else None


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _stored(node: ir.Node) -> bool:
    integers = node.inputs[0]
    return integers is not None and integers.is_initializer()
