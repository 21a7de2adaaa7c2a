"""Put encoded weights into a converted model: integers, scales and types exactly as decided."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, assert_never

from edgeship.core.forms import ActivationMode
from edgeship.core.model import Placement
from edgeship.core.weights import Affine, AffineTensor, EncodedTensor, Float, FloatTensor
from edgeship.errors import EncodingError, LoweringError
from edgeship.lowering.litert.flatbuffer import AsideFile, builtin_code
from edgeship.lowering.litert.fold import Layout, Use, start, trace

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

    from edgeship.program.program import TorchProgram

_INSTEAD = "use floats, or int8, int4, int3 or int2"
ActivationMath = Literal["float", "dynamic"]


def storable(name: str, tensor: EncodedTensor) -> FloatTensor | AffineTensor:
    """The tensor, where the format has a form for it. Raises `EncodingError` where it has none."""
    if not isinstance(tensor, FloatTensor | AffineTensor):
        raise EncodingError(f"LiteRT cannot hold {tensor.encoding} ({name})", fix=_INSTEAD)
    return tensor


def refuse_encodings(program: TorchProgram, activations: ActivationMode) -> None:
    """Raise `EncodingError` for a weight that has no exact and safe form here, before the slow conversion."""
    uses = {use.name: use for use in program.record.inventory.weights}
    for name, encoding in program.record.encodings.items():
        if isinstance(encoding, Float):
            continue
        if not isinstance(encoding, Affine) or encoding.bits not in _CONTAINERS:
            raise EncodingError(f"LiteRT cannot hold {encoding} ({name})", fix=_INSTEAD)
        if not encoding.symmetric:
            raise EncodingError(
                f"LiteRT cannot hold the zero points of {name}: its kernels ignore them", fix="use symmetric integers"
            )
        op = uses[name].op if name in uses else "other"
        if encoding.granularity == "group" and not (op == "embedding" or (op, activations) == _GROUPED_LINEAR):
            raise _no_groups(name)


def _no_groups(name: str) -> EncodingError:
    return EncodingError(
        f"LiteRT cannot dequantize the groups of {name} outside a linear layer with dynamic activations",
        fix="use per-channel scales, or dynamic activations",
    )


@dataclass(frozen=True)
class FloatRows:
    """A weight in float32 that is read from disk row by row while it is stored.

    Args:
        read: ``read(start, stop)`` gives those rows as an array.
    """

    shape: tuple[int, ...]
    read: Callable[[int, int], Any]

    @property
    def encoding(self) -> Float:
        """Float of 32 bits."""
        return Float(32)


Storable: TypeAlias = FloatTensor | AffineTensor | FloatRows


@dataclass
class Constants:
    """The buffers of a model: each constant is written once, whichever signatures use it.

    Args:
        aside: where the bytes wait when the model is larger than memory.
    """

    model: schema.ModelT
    aside: AsideFile | None = None
    numbers: dict[tuple[str, Layout | None], int] = field(default_factory=dict)

    def number(self, name: str, layout: Layout | None, pieces: Callable[[], Iterable[Any]]) -> int:
        """The buffer of a constant, made of ``pieces()`` when it is not there yet."""
        import numpy as np
        from ai_edge_litert import schema_py_generated as schema

        key = (name, layout)
        if key not in self.numbers:
            arrays = (piece.reshape(-1).view("uint8") for piece in pieces())
            data = self.aside.add(arrays) if self.aside is not None else np.concatenate(list(arrays))
            self.model.buffers.append(schema.BufferT(data=data))
            self.numbers[key] = len(self.model.buffers) - 1
        return self.numbers[key]


@dataclass
class WeightStorer:
    """Stores weights in one subgraph of a converted model, where they still are inputs.

    Args:
        activations: ``float`` puts a DEQUANTIZE before the consumer (exact arithmetic); ``dynamic`` lets consumers
            that have a safe integer kernel read the integers and quantize their activations while running.
        constants: the model's buffers; signatures that are given the same share their weights.
    """

    model: schema.ModelT
    subgraph: schema.SubGraphT
    activations: ActivationMath = "float"
    constants: Constants | None = None

    def store(self, tensors: Sequence[int], weights: Sequence[tuple[str, Storable]]) -> list[Placement]:
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
                index = self._add_constant(name, stored, weight, layout)
                placements.append(Placement(name, stored, layout.permutation(len(weight.shape)), layout.shape))
                here = [use for use in uses if use.layout == layout]
                restored += self._connect(stored, index, weight, here)
        self.subgraph.operators[:0] = restored
        gone = set(tensors)
        self.subgraph.inputs = [index for index in self.subgraph.inputs if index not in gone]
        return placements

    def _connect(self, name: str, constant: int, weight: Storable, uses: list[Use]) -> list[Any]:
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

    def _reads_directly(self, use: Use, weight: Storable) -> bool:
        """Whether the consumer itself takes the stored form, with the arithmetic that was asked for."""
        from ai_edge_litert import schema_py_generated as schema

        if not isinstance(weight, AffineTensor):
            return weight.encoding.bits == 32
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
        # The kernels for depthwise convolutions, and for 4-bit ones, take two to four times as long as float
        # (docs/decisions/0021). Grouped convolutions have none.
        if code != kinds.CONV_2D or encoding.granularity != "channel" or encoding.bits != 8:
            return False
        channels = self.subgraph.tensors[use.operator.inputs[0]].shape[3]
        return int(channels) == use.layout.shape[3]

    def _add_constant(self, name: str, stored: str, weight: Storable, layout: Layout) -> int:
        from ai_edge_litert import schema_py_generated as schema

        types = schema.TensorType
        quantization = None
        bits = weight.encoding.bits
        match weight:
            case FloatTensor() | FloatRows():
                kind = types.FLOAT16 if bits == 16 else types.FLOAT32
            case AffineTensor():
                kind = {8: types.INT8, 4: types.INT4, 2: types.INT2}[_CONTAINERS[bits]]
                quantization = self._quantization(stored, weight, layout)
            case _:
                assert_never(weight)
        buffer = self._constants().number(name, layout, lambda: _pieces(weight, layout))
        return self._add_tensor(stored, kind, layout.shape, buffer, quantization)

    def _constants(self) -> Constants:
        if self.constants is None:
            self.constants = Constants(self.model)
        return self.constants

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
        buffer = self._constants().number(f"{name} scales", None, lambda: [np.ascontiguousarray(scale)])
        index = self._add_tensor(f"{name} scales", schema.TensorType.FLOAT16, scale.shape, buffer)
        details = schema.BlockwiseQuantizationT(scales=index, zeroPoints=-1, blockSize=weight.encoding.group_size or 0)
        return schema.QuantizationParametersT(
            details=details, detailsType=schema.QuantizationDetails.BlockwiseQuantization, quantizedDimension=0
        )

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
_PIECE_ELEMENTS = 1 << 20
# Decided bits -> bits in the file.
_CONTAINERS: Mapping[int, int] = {8: 8, 4: 4, 3: 4, 2: 2}


def _pieces(weight: Storable, layout: Layout) -> Iterator[Any]:
    """The bytes of a stored weight, some rows at a time where they lie as in the weight itself."""
    import numpy as np

    bits = _CONTAINERS[weight.encoding.bits] if isinstance(weight, AffineTensor) else 8
    if layout.axes == tuple(range(len(weight.shape))) and not layout.flipped and weight.shape and weight.shape[0]:
        count = weight.shape[0]
        # A multiple of 8 rows is a whole number of bytes whatever the bits.
        step = max(8, _PIECE_ELEMENTS // max(1, math.prod(weight.shape[1:])) // 8 * 8)
        for start in range(0, count, step):
            yield _packed(np.ascontiguousarray(_rows(weight, start, min(start + step, count))), bits)
        return
    values = _rows(weight, 0, weight.shape[0] if weight.shape else 1)
    yield _packed(np.ascontiguousarray(values.transpose(layout.permutation(values.ndim))), bits)


def _rows(weight: Storable, start: int, stop: int) -> Any:
    match weight:
        case FloatRows():
            return weight.read(start, stop)
        case FloatTensor() | AffineTensor():
            return weight.values[start:stop] if weight.shape else weight.values
        case _:
            assert_never(weight)


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
