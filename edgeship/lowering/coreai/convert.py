"""Core AI's converter, with every decided weight put in under its own name, exactly as it was decided.

coreai-torch 0.4.3 meets weights as placeholders of the graph. Those in ``encoded`` become constants named
``weight``, ``weight.scale`` and ``weight.zero_point`` and a ``coreai.blockwise_shift_scale``, so that no range is
guessed and no integer is recomputed; the converter itself never sees the weight's values.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import coreai.authoring  # before its dialects, which import it in a circle
import numpy as np
import torch
from coreai._compiler.dialects import coreai
from coreai._compiler.ir import DenseResourceElementsAttr, F16Type, F32Type, IntegerType, RankedTensorType
from coreai_torch import TorchConverter

from edgeship.core.weights import AffineTensor, FloatTensor
from edgeship.errors import EdgeshipError, EncodingError, LoweringError, UnsupportedOpError
from edgeship.program.inventory import weight_nodes
from edgeship.program.provenance import where

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from coreai._compiler.ir import Type, Value
    from coreai.authoring import AIProgram
    from torch.export import ExportedProgram
    from torch.fx import Node

    from edgeship.core.model import Signature
    from edgeship.core.weights import Array, EncodedTensor

ENTRY = "main"

# The converter stamps the time of day; a fixed date keeps the file the same from build to build.
CREATION_DATE = "20260101T000000Z"


def convert(
    exported: ExportedProgram, encoded: Mapping[str, EncodedTensor], aliases: Mapping[str, str], signature: Signature
) -> tuple[AIProgram, dict[str, str]]:
    """A Core AI program, and the name that each encoded weight has in it.

    Raises:
        UnsupportedOpError: the converter failed on an operator. LoweringError: it failed as a whole.
    """
    converter = _ExactConverter(encoded, aliases, weight_nodes(exported))
    converter.register_torch_lowering("quantized_decomposed::quantize_per_tensor.default")(_quantize)
    converter.register_torch_lowering("quantized_decomposed::dequantize_per_tensor.default")(_dequantize)
    try:
        converter.add_exported_program(
            exported,
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            entrypoint_name=ENTRY,
        )
        program = converter.to_coreai()
    except EdgeshipError:
        raise
    except Exception as error:
        raise LoweringError(
            f"Core AI's converter failed: {_first_line(error)}", fix="try another runtime, or report the model"
        ) from error
    return program, converter.stored


def save(program: AIProgram, path: Path) -> None:
    """Write the asset, with a fixed date."""
    program.save_asset(path)
    metadata = path / "metadata.json"
    facts = json.loads(metadata.read_text())
    facts["creationDate"] = CREATION_DATE
    metadata.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


class _ExactConverter(TorchConverter):  # type: ignore[misc]
    """`TorchConverter` that takes encoded weights from us instead of from the graph's state."""

    def __init__(
        self, encoded: Mapping[str, EncodedTensor], aliases: Mapping[str, str], placeholders: Mapping[str, Node]
    ) -> None:
        super().__init__(mode=TorchConverter.Mode.RELEASE)
        self.stored: dict[str, str] = {}
        self._names = {node.name: aliases.get(name, name) for name, node in placeholders.items()}
        self._encoded = encoded
        self._made: dict[str, Value] = {}

    def _handle_placeholder_op(self, node: Node) -> None:
        name = self._names.get(node.name, "")
        if name not in self._encoded:
            super()._handle_placeholder_op(node)
            return
        if name not in self._made:
            dtype = node.meta["val"].dtype
            self._made[name] = self._weight(name, self._encoded[name], dtype)
        self._values_map[node.target] = self._made[name]

    def _weight(self, name: str, tensor: EncodedTensor, dtype: torch.dtype) -> Value:
        element = F16Type.get() if dtype == torch.float16 else F32Type.get()
        if isinstance(tensor, FloatTensor):
            value, self.stored[name] = _constant(name, tensor.values, element)
            return value
        if not isinstance(tensor, AffineTensor) or tensor.encoding.bits not in (2, 4, 8):
            raise EncodingError(f"Core AI cannot store {tensor.encoding} for {name}", fix="choose another encoding")
        bits = tensor.encoding.bits
        signed = tensor.encoding.symmetric
        integer = IntegerType.get_signed(bits) if signed else IntegerType.get_unsigned(bits)
        values, self.stored[name] = _constant(name, pack(tensor.values, bits), integer, tensor.shape)
        scales = tensor.scale.astype(np.float16 if dtype == torch.float16 else np.float32)
        if not np.array_equal(scales.astype(np.float32), tensor.scale):
            raise EncodingError(f"a scale of {name} is not a float16 number", fix="lower in float32")
        scale, _ = _constant(f"{name}.scale", scales, element)
        blocks = list(tensor.scale.shape)
        if tensor.zero_point is None:
            zero = coreai.constant(np.zeros(blocks, np.int8), dtype=integer)
        else:
            zero, _ = _constant(f"{name}.zero_point", pack(tensor.zero_point, bits), integer, tuple(blocks))
        offset = coreai.constant(np.zeros(blocks, scales.dtype))
        return coreai.blockwise_shift_scale(values, scale, zero, offset)

    def _handle_call_function_op(self, node: Node) -> None:
        try:
            super()._handle_call_function_op(node)
        except EdgeshipError:
            raise
        except Exception as error:
            raise UnsupportedOpError(
                f"Core AI's converter cannot lower {node.target} at {where(node)}: {_first_line(error)}",
                fix="rewrite that layer, or leave Core AI out with --runtime",
            ) from error


def pack(values: Array, bits: int) -> Array:
    """Integers of 2, 4 or 8 bits in bytes, the first in the lowest bits; a flat array."""
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    if bits == 8:
        return flat
    each = 8 // bits
    padded = np.zeros(-(-flat.size // each) * each, np.uint8)
    padded[: flat.size] = flat & (2**bits - 1)
    packed = np.zeros(padded.size // each, np.uint8)
    for place in range(each):
        packed |= padded[place::each] << (bits * place)
    return packed


def _constant(name: str, data: Array, element: Type, shape: tuple[int, ...] | None = None) -> tuple[Value, str]:
    """A constant kept under ``name``; the name it really got is the second result."""
    kind = RankedTensorType.get(list(data.shape if shape is None else shape), element)
    attribute = DenseResourceElementsAttr.get_from_buffer(np.ascontiguousarray(data), name, kind)
    value = coreai.ConstantOp(value=attribute).result
    return value, str(attribute).split("<", 1)[1].split(">", 1)[0].strip('"')


def _quantize(values: Mapping[str, Value], node: Node, location: Any) -> Value:
    scale, zero, offset, axis = _grid(node, values[node.all_input_nodes[0].name].type.element_type)
    return coreai.quantize(values[node.all_input_nodes[0].name], scale, zero, offset, axis, loc=location)


def _dequantize(values: Mapping[str, Value], node: Node, location: Any) -> Value:
    element = F16Type.get() if node.meta["val"].dtype == torch.float16 else F32Type.get()
    scale, zero, offset, axis = _grid(node, element)
    return coreai.dequantize(values[node.all_input_nodes[0].name], scale, zero, offset, axis, loc=location)


def _grid(node: Node, element: Type) -> tuple[Value, Value, Value, Value]:
    scale, zero_point, dtype = (cast("Any", node.args[place]) for place in (1, 2, 5))
    if dtype != torch.int8:
        raise EncodingError(
            f"Core AI quantizes activations to int8 only, not {dtype} (at {where(node)})", fix="use float activations"
        )
    kind = np.float16 if element == F16Type.get() else np.float32
    if float(kind(scale)) != np.float32(scale):
        raise EncodingError(f"the activation scale {scale} at {where(node)} is not a float16 number", fix="use float32")
    integer = IntegerType.get_signed(8)
    return (
        coreai.constant(np.array(scale, kind)),
        coreai.constant(np.array(zero_point, np.int8), dtype=integer),
        coreai.constant(np.array(0, kind)),
        coreai.constant(np.array(0, np.int32)),
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
