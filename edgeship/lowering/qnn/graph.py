"""An ONNX graph that rewrites change: by what makes a value and what reads it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    Array = npt.NDArray[Any]


class Graph:
    """Nodes by what they make and read, constants by name, and changes that take effect in `finish`."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._graph = model.graph
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.made_by = {name: node for node in model.graph.node for name in node.output}
        self.read_by: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.read_by.setdefault(name, []).append(node)
        self.ends = {output.name for output in model.graph.output}
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._before: dict[str, list[onnx.NodeProto]] = {}
        self._gone: set[int] = set()

    def array(self, name: str) -> Array:
        """The content of a constant."""
        import onnx

        array: Array = onnx.numpy_helper.to_array(self.constants[name])
        return array

    def scale_of(self, name: str) -> float | None:
        """The scale of a quantized activation; None when ``name`` is not one."""
        node = self.made_by.get(name)
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] in self.constants:
            return None
        return float(self.array(node.input[1]))

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape of a value of the graph as it was read; None when it cannot be inferred."""
        import onnx

        if self._shapes is None:
            # Once: it copies the whole graph.
            inferred = onnx.shape_inference.infer_shapes(self._model).graph
            values = [*inferred.value_info, *inferred.input, *inferred.output]
            self._shapes = {}
            for value in values:
                self._shapes[value.name] = tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
        return self._shapes.get(name)

    def constant(self, name: str, array: Array) -> str:
        """Add a constant, once."""
        import onnx

        if name not in self.constants:
            self.constants[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def add(self, before: onnx.NodeProto, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node that runs before another; returns what it makes."""
        import onnx

        node = onnx.helper.make_node(op, inputs, [output], name=f"node_{output}", **attributes)
        self._before.setdefault(before.output[0], []).append(node)
        return output

    def pair(self, before: onnx.NodeProto, value: str, scale: str, zero: str) -> str:
        """Quantize and restore ``value``."""
        integers = self.add(before, "QuantizeLinear", [value, scale, zero], f"{value}_{scale}_q")
        return self.add(before, "DequantizeLinear", [integers, scale, zero], f"{value}_{scale}_r")

    def replace(self, node: onnx.NodeProto, value: str) -> None:
        """Let the last new node before ``node``, which makes ``value``, make what ``node`` made."""
        last = self._before[node.output[0]][-1]
        assert last.output[0] == value
        last.output[0] = node.output[0]
        self._gone.add(id(node))

    def finish(self) -> None:
        """Put the new nodes in place, and drop what nothing reads."""
        nodes: list[onnx.NodeProto] = []
        for node in self.nodes:
            nodes += self._before.get(node.output[0], [])
            if id(node) not in self._gone:
                nodes.append(node)
        read = {output.name for output in self._graph.output}
        for node in nodes:
            read.update(node.input)
        kept: list[onnx.NodeProto] = []
        made: set[str] = set()
        used: set[str] = set()
        for node in nodes:
            if not read.isdisjoint(node.output):
                # A copy: the graph's own nodes are deleted with the list that holds them.
                kept.append(copy.deepcopy(node))
                made.update(node.output)
                used.update(node.input)
        constants = [copy.deepcopy(tensor) for tensor in self.constants.values() if tensor.name in used]
        # Shapes that the exporter noted, but for values that are gone.
        noted = [copy.deepcopy(value) for value in self._graph.value_info if value.name in made]
        for field, items in (
            (self._graph.node, kept),
            (self._graph.initializer, constants),
            (self._graph.value_info, noted),
        ):
            del field[:]
            field.extend(items)
