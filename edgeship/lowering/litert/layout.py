"""Keep a network in the layout of its convolutions: transposes around operators that compute in any layout go.

The converter moves convolutions and a few operators beside them to NHWC, and puts a TRANSPOSE wherever another one
still computes in torch's NCHW, as pads and what stands between integers do. Here regions of operators that compute in
any layout are turned to the other one where that moves fewer bytes. Numbers only change places: no value changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeship.lowering.litert.flatbuffer import builtin_code, constant
from edgeship.lowering.litert.grids import joined_name
from edgeship.lowering.litert.integer_kernels import operator_names

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

Order = tuple[int, ...]

UNARY = {
    "RELU", "RELU6", "RELU_N1_TO_1", "RELU_0_TO_1", "LEAKY_RELU", "ELU", "HARD_SWISH", "GELU", "LOGISTIC", "TANH",
    "ABS", "NEG", "EXP", "LOG", "SQRT", "RSQRT", "SQUARE", "SIN", "COS", "FLOOR", "CEIL", "ROUND", "SIGN", "QUANTIZE",
    "DEQUANTIZE", "CAST",
}  # fmt: skip
BINARY = {
    "ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "SQUARED_DIFFERENCE", "POW", "GREATER", "GREATER_EQUAL", "LESS",
    "LESS_EQUAL", "EQUAL", "NOT_EQUAL", "FLOOR_DIV", "FLOOR_MOD",
}  # fmt: skip
PADDING = {"PAD", "PADV2", "MIRROR_PAD"}
REDUCING = {"MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD"}
# What an operator more in the graph costs, in bytes that could have been moved.
OPERATOR_BYTES = 256


class Layout:
    """One subgraph, seen through what makes and reads each tensor."""

    def __init__(self, model: schema.ModelT, subgraph: schema.SubGraphT) -> None:
        self.model, self.subgraph = model, subgraph
        self.names = operator_names()
        self.makers: dict[int, Any] = {}
        self.readers: dict[int, list[tuple[Any, int]]] = {}
        for operator in subgraph.operators:
            self.makers.update(dict.fromkeys(operator.outputs, operator))
            for slot, index in enumerate(operator.inputs):
                self.readers.setdefault(index, []).append((operator, slot))

    def name(self, operator: Any) -> str:
        """The operator's name in the schema."""
        return self.names[builtin_code(self.model, operator)]

    def shape(self, index: int) -> Order:
        """The sizes of a tensor."""
        found = self.subgraph.tensors[index].shape
        return () if found is None else tuple(int(size) for size in found)

    def numbers(self, index: int) -> list[int] | None:
        """The values of an int32 constant, or None."""
        found = constant(self.model, self.subgraph.tensors[index], "int32")
        return None if found is None else [int(number) for number in found]

    def is_constant(self, index: int) -> bool:
        """Whether the tensor has its content in the file."""
        data = self.model.buffers[self.subgraph.tensors[index].buffer].data
        return data is not None and len(data) > 0

    def is_output(self, index: int) -> bool:
        """Whether the graph gives the tensor out."""
        return index in self.subgraph.outputs

    def bytes(self, index: int) -> int:
        """What a TRANSPOSE of a tensor costs."""
        return int(math.prod(self.shape(index)) * _dtype(self.subgraph.tensors[index]).itemsize) + OPERATOR_BYTES

    def order(self, operator: Any) -> Order | None:
        """The permutation of a TRANSPOSE; None of anything else."""
        if operator is None or self.name(operator) != "TRANSPOSE":
            return None
        axes = self.numbers(operator.inputs[1])
        return None if axes is None else tuple(axes)

    def slots(self, operator: Any) -> Sequence[int]:
        """The inputs of an operator that stand in the layout of its result."""
        name = self.name(operator)
        if name == "CONCATENATION":
            return range(len(operator.inputs))
        return (0, 1) if name in BINARY else (0,)

    def computed(self, operator: Any) -> list[int]:
        """The slots of activations among them."""
        return [slot for slot in self.slots(operator) if not self.is_constant(operator.inputs[slot])]

    def turns(self, operator: Any, rank: int) -> bool:
        """Whether an operator computes tensors of ``rank`` axes in any order of them."""
        name = self.name(operator)
        known = name in UNARY or name in BINARY or name in PADDING or name in REDUCING or name == "CONCATENATION"
        if not known or len(operator.outputs) != 1 or len(self.shape(operator.outputs[0])) != rank:
            return False
        computed = self.computed(operator)
        if not computed or any(len(self.shape(operator.inputs[slot])) != rank for slot in computed):
            return False
        if name in PADDING or name in REDUCING:
            return self.numbers(operator.inputs[1]) is not None and getattr(operator.builtinOptions, "keepDims", True)
        return name != "CONCATENATION" or len(computed) == len(operator.inputs)


def keep_layout(model: schema.ModelT, subgraph: schema.SubGraphT) -> None:
    """Turn every region of a graph for which that moves fewer bytes, in place."""
    for _ in range(len(subgraph.operators)):
        layout = Layout(model, subgraph)
        orders = {order for operator in subgraph.operators if (order := layout.order(operator)) is not None}
        turns = [turn for order in sorted(orders) for turn in _turns(layout, order)]
        best = max(turns, key=lambda turn: turn.gain, default=None)
        if best is None or best.gain <= 0:
            return
        best.apply()


def fold_pads(model: schema.ModelT, subgraph: schema.SubGraphT) -> None:
    """Zeros around a convolution's input become its padding SAME, where that is how many it would put there."""
    from ai_edge_litert import schema_py_generated as schema

    layout = Layout(model, subgraph)
    for operator in subgraph.operators:
        if layout.name(operator) not in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            continue
        pad, options = layout.makers.get(operator.inputs[0]), operator.builtinOptions
        if pad is None or layout.name(pad) != "PAD" or options.padding != schema.Padding.VALID:
            continue
        source = pad.inputs[0]
        if layout.numbers(pad.inputs[1]) == _same_padding(
            layout.shape(source), layout.shape(operator.inputs[1]), options
        ):
            tensors = subgraph.tensors
            tensors[source].name = joined_name(tensors[source].name, tensors[operator.inputs[0]].name)
            operator.inputs[0], options.padding = source, schema.Padding.SAME
    subgraph.operators = _with_readers(subgraph)


def _same_padding(size: Order, kernel: Order, options: Any) -> list[int]:
    """Zeros at the start and the end of each axis of ``[N, H, W, C]`` that the padding SAME stands for."""
    pads = [0, 0]
    steps = ((options.strideH, options.dilationHFactor), (options.strideW, options.dilationWFactor))
    for axis, (stride, dilation) in enumerate(steps, start=1):
        reach = dilation * (kernel[axis] - 1) + 1
        total = max((-(-size[axis] // stride) - 1) * stride + reach - size[axis], 0)
        pads += [total // 2, total - total // 2]
    return [*pads, 0, 0]


def _with_readers(graph: schema.SubGraphT) -> list[Any]:
    """The operators of a graph but pads that nothing reads."""
    read = {index for operator in graph.operators for index in operator.inputs} | set(graph.outputs)
    return [operator for operator in graph.operators if read.intersection(operator.outputs) or not operator.outputs]


def inverse(order: Order) -> Order:
    """The permutation that undoes ``order``."""
    return tuple(order.index(axis) for axis in range(len(order)))


def _turns(layout: Layout, order: Order) -> Iterator[_Turn]:
    """Connected operators whose results could stand as what a TRANSPOSE by ``order`` reads."""
    able = [operator for operator in layout.subgraph.operators if layout.turns(operator, len(order))]
    left = {id(operator) for operator in able}
    for start in able:
        if id(start) not in left:
            continue
        left.discard(id(start))
        members, waiting = [], [start]
        while waiting:
            operator = waiting.pop()
            members.append(operator)
            for other in _neighbours(layout, operator):
                if id(other) in left:
                    left.discard(id(other))
                    waiting.append(other)
        yield _Turn(layout, order, members)


def _neighbours(layout: Layout, operator: Any) -> Iterator[Any]:
    for slot in layout.computed(operator):
        if operator.inputs[slot] in layout.makers:
            yield layout.makers[operator.inputs[slot]]
    for reader, slot in layout.readers.get(operator.outputs[0], ()):
        if slot in layout.slots(reader):
            yield reader


@dataclass
class _Turn:
    """A region that could be turned: from the outer layout, which a TRANSPOSE by ``order`` makes, to the inner one.

    Args:
        operators: the region.
    """

    layout: Layout
    order: Order
    operators: Sequence[Any]

    def __post_init__(self) -> None:
        layout = self.layout
        self.back = inverse(self.order)
        transposes = (item for item in layout.subgraph.operators if layout.order(item) is not None)
        self.code = next(item.opcodeIndex for item in transposes)
        self.members = {id(operator) for operator in self.operators}
        self._leave_out()
        self.operators = [operator for operator in self.operators if id(operator) in self.members]
        self.made = {operator.outputs[0] for operator in self.operators}
        self.given = [index for index in self._touched(self.operators) if index not in self.made]
        self.gain = sum(map(self._gain, [*self.given, *self.made]))

    def _touched(self, operators: Sequence[Any]) -> list[int]:
        """The activations that operators read and make."""
        computed = self.layout.computed
        read = [operator.inputs[slot] for operator in operators for slot in computed(operator)]
        return list(dict.fromkeys([*read, *(operator.outputs[0] for operator in operators)]))

    def _leave_out(self) -> None:
        """Leave out operators one by one for as long as that gains something."""
        changed = True
        while changed:
            changed = False
            for operator in self.operators:
                if id(operator) not in self.members:
                    continue
                touched = self._touched([operator])
                before = sum(map(self._gain, touched))
                self.members.discard(id(operator))
                if sum(map(self._gain, touched)) > before:
                    changed = True
                else:
                    self.members.add(id(operator))

    def _gain(self, index: int) -> int:
        """Bytes of transposes that go, less those that come, for one tensor that the region makes or reads."""
        layout = self.layout
        maker = layout.makers.get(index)
        if id(maker) in self.members:
            undone, others = self._outside(index)
            gone = sum(layout.bytes(operator.outputs[0]) for operator in undone)
            return gone - (layout.bytes(index) if others or layout.is_output(index) else 0)
        inside = [self._reads_inside(reader, slot) for reader, slot in layout.readers.get(index, ())]
        if not any(inside):
            return 0
        if maker is None or layout.order(maker) != self.order:
            return -layout.bytes(index)
        return layout.bytes(index) if all(inside) and not layout.is_output(index) else 0

    def _reads_inside(self, reader: Any, slot: int) -> bool:
        return id(reader) in self.members and slot in self.layout.slots(reader)

    def _outside(self, index: int) -> tuple[list[Any], list[tuple[Any, int]]]:
        """Who reads a result outside the region: transposes back to the inner layout, and everyone else."""
        layout = self.layout
        undone, others = [], []
        for reader, slot in layout.readers.get(index, ()):
            if self._reads_inside(reader, slot):
                continue
            if layout.order(reader) == self.back and not layout.is_output(reader.outputs[0]):
                undone.append(reader)
            else:
                others.append((reader, slot))
        return undone, others

    def apply(self) -> None:
        """Turn the region."""
        layout, graph = self.layout, self.layout.subgraph
        inner = {index: self._inner(index) for index in self.given}
        for operator in self.operators:
            for slot in layout.slots(operator):
                if layout.is_constant(operator.inputs[slot]):
                    operator.inputs[slot] = self._turned_constant(operator.inputs[slot])
                else:
                    operator.inputs[slot] = inner.get(operator.inputs[slot], operator.inputs[slot])
            self._turn_options(operator)
        for index in sorted(self.made):
            undone, others = self._outside(index)
            for operator in undone:
                graph.operators.remove(operator)
                self._join_names(index, operator.outputs[0])
                for reader, slot in layout.readers.get(operator.outputs[0], ()):
                    reader.inputs[slot] = index
            if others or layout.is_output(index):
                self._outer(index, others)
            else:
                graph.tensors[index].shape = [layout.shape(index)[axis] for axis in self.back]
        graph.operators = _in_order(graph)

    def _inner(self, index: int) -> int:
        """A given tensor in the inner layout: what its TRANSPOSE read, or a new TRANSPOSE."""
        layout = self.layout
        maker = layout.makers.get(index)
        if maker is not None and layout.order(maker) == self.order:
            alone = all(self._reads_inside(reader, slot) for reader, slot in layout.readers[index])
            source = int(maker.inputs[0])
            if alone and not layout.is_output(index):
                layout.subgraph.operators.remove(maker)
                self._join_names(source, index)
            return source
        made = self._like(index, [layout.shape(index)[axis] for axis in self.back])
        self._add_transpose(index, made, self.back)
        return made

    def _join_names(self, kept: int, gone: int) -> None:
        tensors = self.layout.subgraph.tensors
        tensors[kept].name = joined_name(tensors[kept].name, tensors[gone].name)

    def _outer(self, index: int, others: Sequence[tuple[Any, int]]) -> None:
        """Let a result keep its number and its name for those outside, and come from a new one in the inner layout."""
        layout = self.layout
        made = self._like(index, [layout.shape(index)[axis] for axis in self.back])
        maker = layout.makers[index]
        maker.outputs = [made]
        kept = {(id(reader), slot) for reader, slot in others}
        for operator in layout.subgraph.operators:
            for slot, given in enumerate(operator.inputs):
                if given == index and (id(operator), slot) not in kept:
                    operator.inputs[slot] = made
        self._add_transpose(made, index, self.order)

    def _like(self, index: int, shape: Sequence[int]) -> int:
        from ai_edge_litert import schema_py_generated as schema

        old = self.layout.subgraph.tensors[index]
        self.layout.subgraph.tensors.append(
            schema.TensorT(
                name=b"%s turned" % old.name, type=old.type, shape=list(shape), quantization=old.quantization,
                buffer=0, hasRank=True,
            )
        )  # fmt: skip
        return len(self.layout.subgraph.tensors) - 1

    def _add_transpose(self, source: int, result: int, order: Order) -> None:
        import numpy as np
        from ai_edge_litert import schema_py_generated as schema

        layout = self.layout
        axes = self._constant(np.asarray(order, np.int32), schema.TensorType.INT32, None, b"order")
        layout.subgraph.operators.append(
            schema.OperatorT(
                opcodeIndex=self.code, inputs=[source, axes], outputs=[result],
                builtinOptionsType=schema.BuiltinOptions.TransposeOptions,
                builtinOptions=schema.TransposeOptionsT(),
            )
        )  # fmt: skip

    def _constant(self, array: Any, kind: int, quantization: Any, name: bytes) -> int:
        import numpy as np
        from ai_edge_litert import schema_py_generated as schema

        layout = self.layout
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        layout.model.buffers.append(schema.BufferT(data=data))
        layout.subgraph.tensors.append(
            schema.TensorT(
                name=name, type=kind, shape=list(array.shape), quantization=quantization,
                buffer=len(layout.model.buffers) - 1, hasRank=True,
            )
        )  # fmt: skip
        return len(layout.subgraph.tensors) - 1

    def _turned_constant(self, index: int) -> int:
        """A constant operand in the inner layout; one number is the same in any."""
        layout = self.layout
        tensor, shape = layout.subgraph.tensors[index], layout.shape(index)
        if math.prod(shape) == 1:
            return index
        values = constant(layout.model, tensor, _dtype(tensor))
        whole = values.reshape((1,) * (len(self.order) - len(shape)) + shape)
        return self._constant(whole.transpose(self.back), tensor.type, tensor.quantization, tensor.name)

    def _turn_options(self, operator: Any) -> None:
        """Axes that an operator names, in the inner layout."""
        import numpy as np
        from ai_edge_litert import schema_py_generated as schema

        layout, name = self.layout, self.layout.name(operator)
        if name == "CONCATENATION":
            operator.builtinOptions.axis = self.order[operator.builtinOptions.axis % len(self.order)]
        elif name in PADDING:
            rows = np.asarray(layout.numbers(operator.inputs[1]), np.int32).reshape(-1, 2)
            turned = rows[list(self.back)]
            operator.inputs[1] = self._constant(turned, schema.TensorType.INT32, None, b"pads")
        elif name in REDUCING:
            axes = [self.order[axis % len(self.order)] for axis in layout.numbers(operator.inputs[1]) or ()]
            operator.inputs[1] = self._constant(np.asarray(axes, np.int32), schema.TensorType.INT32, None, b"axes")


def _dtype(tensor: Any) -> Any:
    """How a tensor's numbers lie in memory."""
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    kinds = schema.TensorType
    types = {
        kinds.INT8: "int8", kinds.UINT8: "uint8", kinds.BOOL: "bool", kinds.INT16: "int16", kinds.FLOAT16: "float16",
        kinds.INT64: "int64", kinds.FLOAT64: "float64", kinds.INT32: "int32",
    }  # fmt: skip
    return np.dtype(types.get(tensor.type, "float32"))


def _in_order(graph: schema.SubGraphT) -> list[Any]:
    """The operators of a graph, each behind those that make what it reads; otherwise as they were."""
    makers = {index: operator for operator in graph.operators for index in operator.outputs}
    done: list[Any] = []
    placed: set[int] = set()
    for root in graph.operators:
        waiting = [root]
        while waiting:
            operator = waiting[-1]
            needed = [makers[index] for index in operator.inputs if index in makers]
            missing = [other for other in needed if id(other) not in placed]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            if id(operator) not in placed:
                placed.add(id(operator))
                done.append(operator)
    return done
