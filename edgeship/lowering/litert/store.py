"""Put encoded weights into a converted model: integers, scales and types exactly as decided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgeship.core.model import Placement
from edgeship.core.runtimes import ActivationMode
from edgeship.core.weights import AffineTensor, EncodedTensor, FloatTensor
from edgeship.errors import EncodingError, LoweringError
from edgeship.lowering.litert.flatbuffer import builtin_code
from edgeship.lowering.litert.fold import Layout, Use, start, trace

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

    from edgeship.program.program import TorchProgram

ActivationMath = Literal["float", "dynamic"]


def refuse_encodings(program: TorchProgram, activations: ActivationMode) -> None:
    """Raise `EncodingError` for a weight that has no exact and safe form here, before the slow conversion."""
    uses = {use.name: use for use in program.record.inventory.weights}
    for name, weight in program.encoded.items():
        if isinstance(weight, FloatTensor):
            continue
        if not isinstance(weight, AffineTensor) or weight.encoding.bits not in _CONTAINERS:
            raise EncodingError(
                f"LiteRT cannot hold {weight.encoding} ({name})", fix="use floats, or int8, int4, int3 or int2"
            )
        if weight.zero_point is not None:
            raise EncodingError(
                f"LiteRT cannot hold the zero points of {name}: its kernels ignore them", fix="use symmetric integers"
            )
        op = uses[name].op if name in uses else "other"
        if weight.encoding.granularity == "group" and not (op == "embedding" or (op, activations) == _GROUPED_LINEAR):
            raise _no_groups(name)


def _no_groups(name: str) -> EncodingError:
    return EncodingError(
        f"LiteRT cannot dequantize the groups of {name} outside a linear layer with dynamic activations",
        fix="use per-channel scales, or dynamic activations",
    )


@dataclass
class WeightStorer:
    """Stores weights in one subgraph of a converted model, where they still are inputs.

    Args:
        activations: ``float`` puts a DEQUANTIZE before the consumer (exact arithmetic); ``dynamic`` lets consumers
            that have a safe integer kernel read the integers and quantize their activations while running.
    """

    model: schema.ModelT
    subgraph: schema.SubGraphT
    activations: ActivationMath = "float"

    def store(self, tensors: Sequence[int], weights: Sequence[tuple[str, EncodedTensor]]) -> list[Placement]:
        """Replace input ``tensors[i]`` by the constant ``weights[i]``; say where each weight lies.

        Raises:
            LoweringError: nothing uses a weight any more. EncodingError: its encoding has no LiteRT form there.
        """
        placements: list[Placement] = []
        restored: list[Any] = []
        for tensor, (name, weight) in zip(tensors, weights, strict=True):
            uses, passed = trace(self.model, self.subgraph, tensor, start(weight.shape))
            if not uses:
                raise LoweringError(f"weight {name} was lost by the LiteRT converter", fix="report this as a bug")
            for operator in passed:
                if operator in self.subgraph.operators:
                    self.subgraph.operators.remove(operator)
            layouts = list(dict.fromkeys(use.layout for use in uses))
            for number, layout in enumerate(layouts):
                stored = name if number == 0 else f"{name}#{number}"
                index = self._add_constant(stored, weight, layout)
                placements.append(Placement(name, stored, layout.permutation(len(weight.shape)), layout.shape))
                here = [use for use in uses if use.layout == layout]
                restored += self._connect(stored, index, weight, here)
        self.subgraph.operators[:0] = restored
        gone = set(tensors)
        self.subgraph.inputs = [index for index in self.subgraph.inputs if index not in gone]
        return placements

    def _connect(self, name: str, constant: int, weight: EncodedTensor, uses: list[Use]) -> list[Any]:
        """Let the uses read the constant, or its dequantized form; the DEQUANTIZE operators that this takes."""
        direct = [use for use in uses if self._reads_directly(use, weight)]
        through = [use for use in uses if use not in direct]
        for use in direct:
            use.operator.inputs[use.slot] = constant
            self._raise_version(use)
        if not through:
            return []
        if isinstance(weight, AffineTensor) and weight.encoding.granularity == "group":
            raise _no_groups(name)
        from ai_edge_litert import schema_py_generated as schema

        shape = self.subgraph.tensors[constant].shape
        floats = self._add_tensor(f"{name} in float32", schema.TensorType.FLOAT32, shape, 0)
        for use in through:
            use.operator.inputs[use.slot] = floats
        version = _DEQUANTIZE_VERSIONS[weight.encoding.bits] if isinstance(weight, AffineTensor) else 3
        return [
            schema.OperatorT(
                opcodeIndex=self._operator_code(schema.BuiltinOperator.DEQUANTIZE, version),
                inputs=[constant],
                outputs=[floats],
                builtinOptionsType=schema.BuiltinOptions.DequantizeOptions,
                builtinOptions=schema.DequantizeOptionsT(),
            )
        ]

    def _reads_directly(self, use: Use, weight: EncodedTensor) -> bool:
        """Whether the consumer itself takes the stored form, with the arithmetic that was asked for."""
        from ai_edge_litert import schema_py_generated as schema

        if isinstance(weight, FloatTensor):
            return bool(weight.values.dtype == "float32")
        assert isinstance(weight, AffineTensor)
        kinds, code = schema.BuiltinOperator, builtin_code(self.model, use.operator)
        encoding = weight.encoding
        if code == kinds.EMBEDDING_LOOKUP and use.slot == 1:
            # Its kernel looks for rows at whole bytes, and is silently wrong when they start within one.
            return math.prod(use.layout.shape[1:]) * _CONTAINERS[encoding.bits] % 8 == 0
        if self.activations != "dynamic" or use.slot != 1:
            return False
        if code == kinds.FULLY_CONNECTED:
            use.operator.builtinOptions.asymmetricQuantizeInputs = True
            return True
        if encoding.granularity != "channel" or weight.encoding.bits == 2:
            return False
        if code == kinds.CONV_2D:
            # Grouped convolutions have no hybrid kernel.
            channels = self.subgraph.tensors[use.operator.inputs[0]].shape[3]
            return int(channels) == use.layout.shape[3]
        return bool(code == kinds.DEPTHWISE_CONV_2D and weight.encoding.bits == 8)

    def _add_constant(self, name: str, weight: EncodedTensor, layout: Layout) -> int:
        from ai_edge_litert import schema_py_generated as schema

        types = schema.TensorType
        quantization = None
        if isinstance(weight, FloatTensor):
            half = weight.values.dtype == "float16"
            data, kind = _rearranged(weight.values, layout), types.FLOAT16 if half else types.FLOAT32
        else:
            assert isinstance(weight, AffineTensor)
            bits = _CONTAINERS[weight.encoding.bits]
            kind = {8: types.INT8, 4: types.INT4, 2: types.INT2}[bits]
            data = _packed(_rearranged(weight.values, layout), bits)
            quantization = self._quantization(name, weight, layout)
        return self._add_tensor(name, kind, layout.shape, self._add_buffer(data), quantization)

    def _quantization(self, name: str, weight: AffineTensor, layout: Layout) -> schema.QuantizationParametersT:
        import numpy as np
        from ai_edge_litert import schema_py_generated as schema

        scale = weight.scale.astype(np.float32)
        if weight.encoding.granularity == "group":
            return self._groups(name, weight, layout)
        scaled = [axis for axis, size in enumerate(scale.shape) if size > 1]
        axis = scaled[0] if scaled else None
        if len(scaled) > 1 or (axis is not None and axis not in layout.axes):
            raise EncodingError(
                f"LiteRT cannot hold scales of shape {scale.shape} for {name}", fix="use one scale a channel"
            )
        return schema.QuantizationParametersT(
            scale=scale.reshape(-1),
            zeroPoint=np.zeros(scale.size, np.int64),
            quantizedDimension=0 if axis is None else layout.axes.index(axis),
        )

    def _groups(self, name: str, weight: AffineTensor, layout: Layout) -> schema.QuantizationParametersT:
        import numpy as np
        from ai_edge_litert import schema_py_generated as schema

        if layout.axes != (0, 1) or _CONTAINERS[weight.encoding.bits] != 4:
            raise EncodingError(
                f"LiteRT cannot hold {weight.encoding} for {name}", fix="use int4 groups on linear layers"
            )
        scale = weight.scale.astype(np.float16)
        index = self._add_tensor(
            f"{name} scales", schema.TensorType.FLOAT16, scale.shape, self._add_buffer(np.ascontiguousarray(scale))
        )
        details = schema.BlockwiseQuantizationT(scales=index, zeroPoints=-1, blockSize=weight.encoding.group_size or 0)
        return schema.QuantizationParametersT(
            details=details, detailsType=schema.QuantizationDetails.BlockwiseQuantization, quantizedDimension=0
        )

    def _add_buffer(self, data: Any) -> int:
        from ai_edge_litert import schema_py_generated as schema

        self.model.buffers.append(schema.BufferT(data=data.reshape(-1).view("uint8")))
        return len(self.model.buffers) - 1

    def _add_tensor(self, name: str, kind: int, shape: Any, buffer: int, quantization: Any = None) -> int:
        from ai_edge_litert import schema_py_generated as schema

        self.subgraph.tensors.append(
            schema.TensorT(
                name=name.encode(), type=kind, shape=list(shape), buffer=buffer, quantization=quantization, hasRank=True
            )
        )
        return len(self.subgraph.tensors) - 1

    def _operator_code(self, builtin: int, version: int) -> int:
        from ai_edge_litert import schema_py_generated as schema

        for index, code in enumerate(self.model.operatorCodes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == builtin:
                code.version = max(code.version, version)
                return index
        self.model.operatorCodes.append(
            schema.OperatorCodeT(builtinCode=builtin, deprecatedBuiltinCode=min(builtin, 127), version=version)
        )
        return len(self.model.operatorCodes) - 1

    def _raise_version(self, use: Use) -> None:
        """Kernels check the operator's version before they take integer weights."""
        from ai_edge_litert import schema_py_generated as schema

        kinds = schema.BuiltinOperator
        versions = {
            kinds.FULLY_CONNECTED: 12, kinds.CONV_2D: 8, kinds.DEPTHWISE_CONV_2D: 7, kinds.EMBEDDING_LOOKUP: 4,
        }  # fmt: skip
        code = self.model.operatorCodes[use.operator.opcodeIndex]
        kind = builtin_code(self.model, use.operator)
        if self.subgraph.tensors[use.operator.inputs[use.slot]].type != schema.TensorType.FLOAT32:
            code.version = max(code.version, versions[kind])


_GROUPED_LINEAR = ("linear", "dynamic")
_DEQUANTIZE_VERSIONS: Mapping[int, int] = {8: 5, 4: 6, 3: 6, 2: 6}
# Decided bits -> bits in the file.
_CONTAINERS: Mapping[int, int] = {8: 8, 4: 4, 3: 4, 2: 2}


def _rearranged(values: Any, layout: Layout) -> Any:
    import numpy as np

    return np.ascontiguousarray(values.transpose(layout.permutation(values.ndim)).reshape(layout.shape))


def _packed(values: Any, bits: int) -> Any:
    """Integers of 4 or 2 bits, the first in the lowest bits of each byte."""
    import numpy as np

    if bits == 8:
        return values
    each = 8 // bits
    flat = values.reshape(-1)
    flat = np.pad(flat, (0, -flat.size % each)).view(np.uint8) & (2**bits - 1)
    packed = np.zeros(flat.size // each, np.uint8)
    for position in range(each):
        packed |= flat[position::each] << (bits * position)
    return packed
