"""Place weights in an ONNX graph exactly as decided: float16 with Cast, integers in one of four forms.

  - what reads static activations: DequantizeLinear, which ONNX Runtime and QNN make integer kernels of;
  - products and lookups that compute on packed integers: `edgeship.lowering.onnx.blocks`;
  - 8 bits with float activations, and of convolutions: `edgeship.lowering.onnx.widened`;
  - everything else: DequantizeLinear, which runs with the layer.

With DequantizeLinear a linear weight is stored [K, N] (transposed): ONNX Runtime's CPU kernels fuse ``DequantizeLinear
-> MatMul`` and ``-> Gemm`` only in that layout. `Placement.permutation` records it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeship.core.model import Placement
from edgeship.core.weights import AffineTensor, EncodedTensor, FloatTensor
from edgeship.errors import EncodingError, LoweringError
from edgeship.lowering.onnx.blocks import store_blocks
from edgeship.lowering.onnx.edit import lazy_tensor, made_later, quantizer
from edgeship.lowering.onnx.embedding import gather_integers
from edgeship.lowering.onnx.linear import is_linear, untranspose
from edgeship.lowering.onnx.widened import widen_at_load

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx_ir as ir

    from edgeship.core.forms import ActivationMode
    from edgeship.program.program import TorchProgram

_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")


def place_weights(
    model: ir.Model,
    weights: dict[str, ir.Value],
    program: TorchProgram,
    activations: ActivationMode = "float",
    *,
    partial: bool = False,
    packed_rows: bool = False,
) -> tuple[Placement, ...]:
    """Give every weight its content. Float weights that compression left alone stay float32.

    Args:
        weights: values without content, by torch name, as `export_graph` returns them.
        partial: the graph is a part of the program that may do without some of its weights.
        packed_rows: beside static activations too, rows of 8-bit tables are taken while they are integers.

    Raises:
        LoweringError: an encoded weight is no longer in the graph.
        EncodingError: its scales have a shape that DequantizeLinear does not take.
    """
    placements = []
    for name in () if partial else program.encoded:
        if name not in weights or not weights[name].uses():
            raise LoweringError(f"the encoded weight {name} is not used in the ONNX graph", fix="keep it in float32")
    static = bool(program.activations)
    # They compute in float whatever stands around them.
    recurrent = {use.name for use in program.record.inventory.weights if use.op == "recurrent"}
    # Floats first: they keep the torch name, and what encoded ones add must not take it.
    for name, value in sorted(weights.items(), key=lambda item: item[0] in program.encoded):
        if not value.uses():
            continue
        tensor = program.encoded.get(name)
        if isinstance(tensor, AffineTensor) and not static:
            stored = store_blocks(model, value, name, tensor, program.encoded, activations)
            if stored is not None:
                placements.append(Placement(name, stored))
                continue
        transposed = is_linear(value) and not _fused_wrongly(value, tensor)
        if transposed:
            untranspose(model, value)
        if tensor is None:
            _store_float(model, value, name, program, transposed)
            continue
        # A convolution that dequantizes at every run is slower than one in float32, whatever activations may be; so is
        # what stays in float among static activations.
        in_integers = static and name not in recurrent and not _in_float(value)
        widened = not in_integers and (activations != "dynamic" or not transposed)
        rows = packed_rows or not in_integers
        stored = _store(model, value, name, tensor, transposed, explicit_zero=in_integers, widened=widened, rows=rows)
        placements.append(Placement(name, stored, (1, 0) if transposed else None))
    return tuple(placements)


def _in_float(value: ir.Value) -> bool:
    """Whether every operator that reads a weight computes in float: a product whose other operand is on no grid, a
    lookup whose rows get none. Only beside a grid does ONNX Runtime leave the integers packed."""

    def on_a_grid(node: ir.Node) -> bool:
        if node.op_type == "Gather":
            return any(use.node.op_type == "QuantizeLinear" for use in node.outputs[0].uses())
        return node.op_type not in _PRODUCTS or quantizer(node.inputs[0]) is not None

    return not any(on_a_grid(use.node) for use in value.uses())


def _fused_wrongly(value: ir.Value, tensor: EncodedTensor | None) -> bool:
    """ONNX Runtime 1.31.1 fuses 2-bit products wrongly unless 4 divides the output channels, silently; not [N, K]."""
    return tensor is not None and tensor.encoding.bits == 2 and int((value.shape or (0,))[0]) % 4 != 0


def _store_float(model: ir.Model, value: ir.Value, name: str, program: TorchProgram, transposed: bool) -> None:
    import onnx_ir as ir

    def read() -> npt.NDArray[Any]:
        """The weight in float; [in, out] where the graph multiplies by the transpose."""
        tensor = program.weight(name)
        array: npt.NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
        return array.T if transposed else array

    dtype = value.dtype or ir.DataType.FLOAT
    value.const_value = lazy_tensor(name, read, dtype, [int(size) for size in value.shape or ()])
    model.graph.initializers[name] = value


def _store(
    model: ir.Model,
    value: ir.Value,
    name: str,
    tensor: EncodedTensor,
    transposed: bool,
    *,
    explicit_zero: bool,
    widened: bool,
    rows: bool,
) -> str:
    """Store one encoded weight before its first use; returns the name of the initializer that holds its numbers.

    Args:
        rows: lookups take rows of the integers.
    """
    import onnx_ir as ir

    def turned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[out, in] -> [in, out] where the graph multiplies by the transpose."""
        return array.T if transposed else array

    def stored(ending: str, array: npt.NDArray[Any], dtype: ir.DataType) -> ir.Value:
        """An initializer of the array's shape."""
        return made_later(model, f"{name}_{ending}", lambda: array, dtype, array.shape)

    if isinstance(tensor, FloatTensor):
        values = turned(tensor.values)
        if tensor.encoding.bits == 32:
            value.const_value = lazy_tensor(name, lambda: values, ir.DataType.FLOAT, values.shape)
            model.graph.initializers[name] = value
            return name
        half = stored("f16", values, ir.DataType.FLOAT16)
        _replace(model, value, ir.node("Cast", [half], {"to": ir.DataType.FLOAT}, name=f"{name}_cast"), name)
        return str(half.name)
    if not isinstance(tensor, AffineTensor):
        raise EncodingError(f"ONNX cannot hold {tensor.encoding} for {name}", fix="use float16 or int8")
    values, scale = turned(tensor.values), turned(tensor.scale)
    zero = None if tensor.zero_point is None else turned(tensor.zero_point)
    if widened and tensor.encoding.bits == 8:
        return str(widen_at_load(model, value, name, values, scale, zero).name)
    attributes, squeezed = block_layout(values.shape, scale.shape, name)
    dtype = _integer_type(model, tensor)
    inputs = [stored("q", values, dtype), stored("scale", scale.reshape(squeezed), ir.DataType.FLOAT)]
    if zero is not None:
        inputs.append(stored("zero", zero.reshape(squeezed), dtype))
    if rows:
        gather_integers(model, value, inputs)
    if not value.uses():
        return str(inputs[0].name)
    if zero is None and explicit_zero:
        # Without it ONNX Runtime leaves a quantized Gemm in float.
        inputs.append(stored("zero", (0 * scale).reshape(squeezed).astype("int8"), dtype))
    _replace(model, value, ir.node("DequantizeLinear", inputs, attributes, name=f"{name}_dequantize"), name)
    return str(inputs[0].name)


def block_layout(
    shape: tuple[int, ...], scale: tuple[int, ...], name: str = "weight"
) -> tuple[dict[str, int], tuple[int, ...]]:
    """Attributes of DequantizeLinear, and the shape it wants of the scale, for scales that tile a weight.

    Raises `EncodingError` when blocks extend over more than one axis: DequantizeLinear has none such.
    """
    spread = [axis for axis, size in enumerate(scale) if size > 1]
    blocked = [axis for axis, (n, s) in enumerate(zip(shape, scale, strict=True)) if s not in (1, n)]
    short = [axis for axis, (n, s) in enumerate(zip(shape, scale, strict=True)) if s != n]
    if not spread:
        return {}, ()
    if len(spread) == 1 and not blocked:
        return {"axis": spread[0]}, (scale[spread[0]],)
    if len(short) == 1:
        axis = short[0]
        return {"axis": axis, "block_size": shape[axis] // scale[axis]}, scale
    raise EncodingError(
        f"ONNX has no DequantizeLinear for scales {scale} over {name} {shape}", fix="use per-channel scales"
    )


def _integer_type(model: ir.Model, tensor: AffineTensor) -> ir.DataType:
    """Container of the integers. 2 bits came with opset 25 (IR 13), which is asked for only when they are there."""
    import onnx_ir as ir

    bits, types = tensor.encoding.bits, ir.DataType
    if bits == 8:
        return types.INT8 if tensor.encoding.symmetric else types.UINT8
    if bits == 2:
        model.graph.opset_imports[""] = max(model.graph.opset_imports[""], 25)
        model.ir_version = max(model.ir_version, 13)
        return types.INT2 if tensor.encoding.symmetric else types.UINT2
    return types.INT4 if tensor.encoding.symmetric else types.UINT4


def _replace(model: ir.Model, value: ir.Value, node: ir.Node, name: str) -> None:
    """Put ``node`` before the first use of ``value``, and let all uses read its output."""
    uses = {use.node for use in value.uses()}
    first = next(candidate for candidate in model.graph if candidate in uses)
    model.graph.insert_before(first, node)
    (output,) = node.outputs
    output.name, output.type, output.shape = f"{name}_value", value.type, value.shape
    value.replace_all_uses_with(output)
