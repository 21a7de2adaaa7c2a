"""Turn ``DEQUANTIZE -> operator -> QUANTIZE`` into the integer operator, wherever its kernel is known to be right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgeship.core.weights import ActivationEncoding
from edgeship.lowering.litert import integer_kernels as table
from edgeship.lowering.litert.flatbuffer import builtin_code, constant
from edgeship.lowering.litert.grids import quantization, tensor_name

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema


class IntegerGraph:
    """One walk over a graph with QUANTIZE and DEQUANTIZE pairs; operators between them compute in integers after it.

    Args:
        nodes: tensor number -> name of the torch graph's node whose integers it holds.
        activations: node name -> its grid.
    """

    def __init__(
        self,
        model: schema.ModelT,
        subgraph: schema.SubGraphT,
        nodes: Mapping[int, str],
        activations: Mapping[str, ActivationEncoding],
    ) -> None:
        self.model, self.subgraph = model, subgraph
        self.nodes: dict[int, list[str]] = {index: [name] for index, name in nodes.items()}
        self.grids = {index: activations[name] for index, name in nodes.items()}
        # Float tensor -> the integers that it is dequantized from; integers -> the same integers met earlier.
        self.integer: dict[int, int] = {}
        self.same: dict[int, int] = {}
        self.restorers: dict[int, Any] = {}
        self.makers: dict[int, Any] = {}
        self.done: list[Any] = []
        # The graph as it came: operators change while the walk goes on.
        self.readers: dict[int, list[tuple[Any, int]]] = {}
        self.sources: dict[int, tuple[Any, list[int]]] = {}
        for operator in subgraph.operators:
            self.sources.update(dict.fromkeys(operator.outputs, (operator, list(operator.inputs))))
            for slot, index in enumerate(operator.inputs):
                self.readers.setdefault(index, []).append((operator, slot))

    def fuse(self) -> None:
        """Rewrite the graph in place, and name the integer tensors after their nodes."""
        for operator in self.subgraph.operators:
            name = self._name(operator)
            if name == "DEQUANTIZE":
                self._dequantize(operator)
            elif name == "QUANTIZE":
                self._quantize(operator)
            elif name in table.MOVERS and self._grid_of(operator.inputs[table.MOVERS[name]]) is not None:
                self._move(operator, table.MOVERS[name])
            elif not (
                self._join_clip(operator, name) or self._fuse_weighted(operator, name) or self._fuse(operator, name)
            ):
                self._keep(operator)
        for index in self.subgraph.outputs:
            self._restore(index)
        self.subgraph.operators = self.done
        self._name_tensors()

    # What stands between the operators.

    def _dequantize(self, operator: Any) -> None:
        source, result = operator.inputs[0], operator.outputs[0]
        operator.inputs = [self.same.get(source, source)]
        self.integer[result] = operator.inputs[0]
        self.restorers[result] = operator

    def _quantize(self, operator: Any) -> None:
        source, result = operator.inputs[0], operator.outputs[0]
        values = constant(self.model, self.subgraph.tensors[source], "float32")
        held = self.integer.get(source)
        if held is not None and self.grids.get(held) == self.grids[result]:
            self.same[result] = held
            self.nodes.setdefault(held, []).extend(self.nodes.get(result, ()))
        elif values is not None and source not in self.integer:
            tensor = self.subgraph.tensors[result]
            tensor.buffer = self._buffer(_on_grid(values, self.grids[result]))
        else:
            # From another grid this requantizes.
            operator.inputs = [source if held is None or held not in self.grids else held]
            self._restore(operator.inputs[0])
            self._raise_version(operator, 16 if held in self.grids else self.grids[result].bits)
            self._emit(operator)

    def _restore(self, index: int) -> None:
        """Make a float tensor out of its integers, if nothing did before."""
        if index not in self.integer or index in self.makers:
            return
        operator = self.restorers.get(index) or self._new_operator("DEQUANTIZE", self.integer[index], index)
        if self.integer[index] in self.grids:
            self._raise_version(operator, self.grids[self.integer[index]].bits)
        self._emit(operator)

    def _keep(self, operator: Any) -> None:
        """Leave an operator in float."""
        for index in operator.inputs:
            self._restore(index)
        self._emit(operator)

    def _emit(self, operator: Any) -> None:
        self.done.append(operator)
        for index in operator.outputs:
            self.makers[index] = operator

    # Operators in integers.

    def _move(self, operator: Any, slot: int) -> None:
        held = self.integer[operator.inputs[slot]]
        grid = self.grids[held]
        swapped = {slot: held}
        if self._name(operator) == "PADV2":
            padding = self.subgraph.tensors[operator.inputs[2]]
            values = constant(self.model, padding, "float32")
            swapped[2] = self._activation(padding, grid, self._buffer(_on_grid(values, grid)))
        self._compute(operator, swapped, [grid] * len(operator.outputs))

    def _join_clip(self, operator: Any, name: str) -> bool:
        """A RELU becomes part of the operator before it, when they share a grid and nothing else reads that one."""
        if name not in table.CLIPS:
            return False
        source, result = operator.inputs[0], operator.outputs[0]
        maker, target = self._sole_maker(source), self._target(result)
        if maker is None or target is None or self._grid_of(source) != target:
            return False
        if maker.builtinOptions.fusedActivationFunction:
            return False
        # A maker that stays in float clips before its result is put on the grid: the same integers, since what lies
        # beyond the clip lands on the level of its end either way.
        if self.grids.get(maker.outputs[0], target) != target:
            return False
        maker.builtinOptions.fusedActivationFunction = table.CLIPS[name]
        self.integer[result] = self.integer[source]
        return True

    def _sole_maker(self, index: int) -> Any:
        """The operator that can clip and whose result reaches ``index`` through pairs and movers, and nothing else."""
        while index in self.sources and len(self.readers[index]) == 1 and index not in self.subgraph.outputs:
            operator, inputs = self.sources[index]
            name = self._name(operator)
            if name in table.CLIPPERS:
                return operator
            if name not in ("QUANTIZE", "DEQUANTIZE") and (name not in table.MOVERS or len(operator.outputs) > 1):
                return None
            index = inputs[table.MOVERS.get(name, 0)]
        return None

    def _fuse_weighted(self, operator: Any, name: str) -> bool:
        """A product with a stored weight: its bias becomes integers with scale ``s_x * s_w``."""
        import numpy as np

        if name not in table.WEIGHTED:
            return False
        data, weight, bias = table.WEIGHTED[name]
        grid, target = self._grid_of(operator.inputs[data]), self._target(operator.outputs[0])
        stored = self.integer.get(operator.inputs[weight])
        if grid is None or target is None or grid.bits != target.bits or stored is None or stored in self.grids:
            return False
        tensor = self.subgraph.tensors[stored]
        scales = None if tensor.quantization is None else tensor.quantization.scale
        if scales is None or not self._takes(name, tensor.type, grid.bits):
            return False
        swapped = {data: self.integer[operator.inputs[data]], weight: stored}
        if len(operator.inputs) > bias and operator.inputs[bias] >= 0:
            values = constant(self.model, self.subgraph.tensors[operator.inputs[bias]], "float32")
            if values is None:
                return False
            steps = np.float32(grid.scale) * np.asarray(scales, np.float32)
            integers = np.rint(values.astype(np.float64) / steps.astype(np.float64))
            limit = 2**31 if grid.bits == 8 else 2**39
            if np.abs(integers).max(initial=0) >= limit:
                return False
            swapped[bias] = self._bias(operator.inputs[bias], integers, steps, grid.bits)
        return self._compute(operator, swapped, [target])

    def _takes(self, name: str, kind: int, bits: int) -> bool:
        """Whether an integer kernel is right with weights of this type and activations of ``bits``."""
        from ai_edge_litert import schema_py_generated as schema

        if kind == schema.TensorType.INT4:
            # Depthwise: wrong without a word (ai-edge-litert 2.3.0). Transposed: does not load.
            return name != "TRANSPOSE_CONV" and not (name == "DEPTHWISE_CONV_2D" and bits == 16)
        return bool(kind == schema.TensorType.INT8)

    def _bias(self, source: int, integers: Any, steps: Any, bits: int) -> int:
        import numpy as np
        from ai_edge_litert import schema_py_generated as schema

        old = self.subgraph.tensors[source]
        kinds = schema.TensorType
        buffer = self._buffer(integers.astype(np.int32 if bits == 8 else np.int64))
        grid = schema.QuantizationParametersT(scale=steps, zeroPoint=np.zeros(steps.size, np.int64))
        return self._tensor(old.name, kinds.INT32 if bits == 8 else kinds.INT64, old.shape, buffer, grid)

    def _fuse(self, operator: Any, name: str) -> bool:
        kernel = table.KERNELS.get(name)
        target = self._target(operator.outputs[0]) if len(operator.outputs) == 1 else None
        if kernel is None or target is None or target.bits not in kernel.widths:
            return False
        if kernel.fixed and target != table.FIXED_GRIDS[kernel.fixed, target.bits]:
            return False
        slots = range(len(operator.inputs)) if kernel.slots is None else kernel.slots
        swapped: dict[int, int] = {}
        for slot in slots:
            index = self._operand(operator.inputs[slot], kernel, target)
            if index is not None:
                swapped[slot] = index
        if len(swapped) < len(slots) or not any(
            self.integer.get(operator.inputs[slot]) in self.grids for slot in slots
        ):
            return False
        for slot, index in swapped.items():
            if kernel.same_grid and self.grids[index] != target:
                swapped[slot] = self._requantized(index, target)
        if name in ("ADD", "SUB"):
            operator.builtinOptions.potScaleInt16 = False
        return self._compute(operator, swapped, [target])

    def _operand(self, index: int, kernel: table.Kernel, target: ActivationEncoding) -> int | None:
        """The integers of an input, or of a single number that no grid was decided for."""
        grid = self._grid_of(index)
        if grid is not None:
            return self.integer[index] if grid.bits == target.bits else None
        values = constant(self.model, self.subgraph.tensors[index], "float32")
        if values is None or values.size != 1 or kernel.same_grid:
            return None
        value, steps = float(values[0]), 127 if target.bits == 8 else 32767
        number = ActivationEncoding(target.bits, abs(value) / steps or 1.0, 0)
        made = self._activation(self.subgraph.tensors[index], number, self._buffer(_on_grid(values, number)))
        return made

    def _requantized(self, index: int, target: ActivationEncoding) -> int:
        made = self._activation(self.subgraph.tensors[index], target, 0)
        operator = self._new_operator("QUANTIZE", index, made)
        self._raise_version(operator, 16)
        self._emit(operator)
        return made

    def _compute(self, operator: Any, swapped: Mapping[int, int], grids: list[ActivationEncoding]) -> bool:
        for slot, index in swapped.items():
            operator.inputs[slot] = index
        floats, operator.outputs = operator.outputs, []
        for index, grid in zip(floats, grids, strict=True):
            made = self._activation(self.subgraph.tensors[index], grid, 0)
            self.integer[index] = made
            operator.outputs.append(made)
        self._raise_version(operator, grids[0].bits)
        self._emit(operator)
        return True

    # Grids.

    def _grid_of(self, index: int) -> ActivationEncoding | None:
        """The grid of the integers behind a float activation."""
        held = self.integer.get(index)
        return None if held is None else self.grids.get(held)

    def _target(self, index: int) -> ActivationEncoding | None:
        """The one grid to which everything that reads a float tensor quantizes it, looking through movers."""
        found: set[ActivationEncoding | None] = set()
        for operator, slot in self.readers.get(index, ()):
            name = self._name(operator)
            if name == "QUANTIZE":
                found.add(self.grids.get(operator.outputs[0]))
            elif name in table.MOVERS and slot == table.MOVERS[name]:
                found.update(self._target(result) for result in operator.outputs)
            else:
                return None
        return found.pop() if len(found) == 1 and index not in self.subgraph.outputs else None

    # The flatbuffer.

    def _name(self, operator: Any) -> str:
        return table.operator_names()[builtin_code(self.model, operator)]

    def _activation(self, like: Any, grid: ActivationEncoding, buffer: int) -> int:
        from ai_edge_litert import schema_py_generated as schema

        kind = schema.TensorType.INT8 if grid.bits == 8 else schema.TensorType.INT16
        index = self._tensor(b"%s integers" % like.name, kind, like.shape, buffer, quantization(grid))
        self.grids[index] = grid
        return index

    def _tensor(self, name: Any, kind: int, shape: Any, buffer: int, grid: Any) -> int:
        from ai_edge_litert import schema_py_generated as schema

        shape = [] if shape is None else list(shape)
        self.subgraph.tensors.append(
            schema.TensorT(name=name, type=kind, shape=shape, buffer=buffer, quantization=grid, hasRank=True)
        )
        return len(self.subgraph.tensors) - 1

    def _buffer(self, data: Any) -> int:
        from ai_edge_litert import schema_py_generated as schema

        self.model.buffers.append(schema.BufferT(data=data.reshape(-1).view("uint8")))
        return len(self.model.buffers) - 1

    def _new_operator(self, name: str, source: int, result: int) -> Any:
        from ai_edge_litert import schema_py_generated as schema

        number = getattr(schema.BuiltinOperator, name)
        codes = self.model.operatorCodes
        known = [max(entry.builtinCode, entry.deprecatedBuiltinCode) for entry in codes]
        if number not in known:
            known.append(number)
            codes.append(schema.OperatorCodeT(builtinCode=number, deprecatedBuiltinCode=min(number, 127), version=1))
        options = f"{name.capitalize()}Options"
        return schema.OperatorT(
            opcodeIndex=known.index(number),
            inputs=[source],
            outputs=[result],
            builtinOptionsType=getattr(schema.BuiltinOptions, options),
            builtinOptions=getattr(schema, f"{options}T")(),
        )

    def _raise_version(self, operator: Any, bits: int) -> None:
        code = self.model.operatorCodes[operator.opcodeIndex]
        code.version = max(code.version, table.VERSIONS.get(self._name(operator), (1, 1))[bits == 16])

    def _name_tensors(self) -> None:
        taken: dict[str, int] = {}
        for index, nodes in self.nodes.items():
            if index in self.same or index not in self.grids:
                continue
            name = tensor_name(nodes, self.grids[index].bits)
            number = taken[name] = taken.get(name, -1) + 1
            self.subgraph.tensors[index].name = (f"{name}#{number}" if number else name).encode()


def _on_grid(values: Any, grid: ActivationEncoding) -> Any:
    """float32 values as integers, rounded as the reference rounds them."""
    import numpy as np

    # torch multiplies by the reciprocal, in float32.
    integers = np.rint(values * (np.float32(1) / np.float32(grid.scale))) + grid.zero_point
    return np.clip(integers, grid.low, grid.high).astype(np.int8 if grid.bits == 8 else np.int16)
