"""Walks an ONNX graph node by node, with constants computed on the spot and everything else recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import torch
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

import edgeship.frontends.onnx.ops  # noqa: F401 - fills the registry
from edgeship.compat.torch import DataDependentOutputException, DynamicOutputShapeException, WeakIdKeyDictionary
from edgeship.core.names import in_shell
from edgeship.errors import EdgeshipError, OpenSizeError, SourceError, UnsupportedOpError
from edgeship.frontends.onnx import registry
from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.carried import carried, on_grid
from edgeship.frontends.onnx.counting import MAX_NODES, check_node_count
from edgeship.frontends.onnx.dtypes import SUB_BYTE_BITS
from edgeship.frontends.onnx.graph import normal_domain, opset_versions
from edgeship.frontends.onnx.ordering import in_order, names_read
from edgeship.frontends.onnx.schemas import function_body, refusal
from edgeship.frontends.onnx.tensors import read_sparse, read_tensor
from edgeship.frontends.onnx.values import Quantized, Recorder, Value, is_constant

MAX_DEPTH = 40

NEWEST = onnx.defs.onnx_opset_version()

#: Folding these changes how a weight is stored, not which weight it is: the result keeps the name.
_SAME_WEIGHT = frozenset(
    {"Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)


@dataclass
class Scope:
    """The names that one graph or function body can see."""

    label: str
    opsets: Mapping[str, int]
    bindings: Mapping[str, AttributeProto] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    initializers: dict[str, TensorProto | SparseTensorProto] = field(default_factory=dict)
    decoded: dict[str, torch.Tensor] = field(default_factory=dict)
    parent: Scope | None = None


class Interpreter:
    """Runs the graphs of one model against one recorder."""

    def __init__(self, model: ModelProto, path: Path, recorder: Recorder) -> None:
        self._model = model
        self._path = path
        self._recorder = recorder
        self._opsets = opset_versions(model)
        self._functions = {(normal_domain(f.domain), f.name, f.overload): f for f in model.functions}
        self._elem_types = WeakIdKeyDictionary()
        self._nodes_left = MAX_NODES
        self._depth = 0

    def run_main(self, graph: GraphProto, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The outputs of the main graph. Raises EdgeshipError. Each output in its own shape."""
        check_node_count(self._model)
        scope = Scope("the graph", self._opsets, values=dict(inputs))
        for info in graph.input:
            if info.name in inputs:
                self._tag(inputs[info.name], info.type.tensor_type.elem_type)
        outputs = self._run_graph(graph, scope)
        tensors = []
        for info, value in zip(graph.output, outputs, strict=True):
            if isinstance(value, Quantized):
                value = value.integers()
            if not isinstance(value, torch.Tensor):
                raise SourceError(f'output "{info.name}" is no tensor', fix="export a model whose outputs are tensors")
            tensors.append(value)
        return tensors

    def _run_graph(self, graph: GraphProto, scope: Scope) -> list[Value]:
        for tensor in graph.initializer:
            scope.initializers[tensor.name] = tensor
        for sparse in graph.sparse_initializer:
            scope.initializers[sparse.values.name] = sparse
        names = [info.name for info in graph.output]
        self._run_nodes(graph.node, scope, keep=names)
        return [self._lookup(name, scope, f"output of {scope.label}") for name in names]

    def _run_nodes(self, nodes: Sequence[NodeProto], scope: Scope, keep: Sequence[str]) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise SourceError(f"{scope.label} is nested too deeply", fix="check the file with onnx.checker")
        nodes = in_order(nodes)
        last_use = {name: index for index, node in enumerate(nodes) for name in names_read(node)}
        dying: dict[int, list[str]] = {}
        for name, index in last_use.items():
            if name not in keep:
                dying.setdefault(index, []).append(name)
        for index, node in enumerate(nodes):
            try:
                self._run_node(node, index, scope)
            except (UnsupportedOpError, OpenSizeError) as error:
                if self._depth == 1:
                    error = self._with_end(error, node, index, scope)
                raise error from error.__cause__
            # Large weights in their ONNX layout would otherwise live until the import ends.
            for name in dying.get(index, ()):
                scope.values.pop(name, None)
        self._depth -= 1

    def _run_node(self, node: NodeProto, index: int, scope: Scope) -> None:
        self._nodes_left -= 1
        if self._nodes_left < 0:
            raise SourceError(f"more than {MAX_NODES} nodes after unrolling", fix="export without the loop")
        domain = normal_domain(node.domain)
        shown = f"{domain}::{node.op_type}" if domain else node.op_type
        where = f'{shown} "{node.name}" (node {index} of {scope.label})'
        inputs = [self._lookup(name, scope, where) if name else None for name in node.input]
        attributes = {a.name: a for a in _bound(node.attribute, scope.bindings)}
        function = self._functions.get((domain, node.op_type, node.overload))
        self._recorder.label = where
        if function is not None:
            outputs: Sequence[Value] = self._run_function(function, inputs, attributes, node.op_type)
        else:
            outputs = self._run_operator(node, domain, where, inputs, attributes, scope)
        self._bind(node, outputs, scope, where)

    def _with_end(
        self, error: UnsupportedOpError | OpenSizeError, node: NodeProto, index: int, scope: Scope
    ) -> UnsupportedOpError | OpenSizeError:
        """The refusal of a node of the main graph, with a value before it at which the graph can end."""
        what = error.what
        if isinstance(error, OpenSizeError):
            what = f'{node.op_type} "{node.name}" (node {index} of {scope.label}): {what}'
        given = {info.name for info in self._model.graph.input}
        made = [name for name in node.input if name and name not in given and not is_constant(self._peek(name, scope))]
        ends = f"end the graph before it with {in_shell(f'--cut={made[0]}')}" if made else ""
        return type(error)(what, fix="; or ".join(part for part in (error.fix, ends) if part))

    def _run_operator(
        self,
        node: NodeProto,
        domain: str,
        where: str,
        inputs: Sequence[Value],
        attributes: Mapping[str, AttributeProto],
        scope: Scope,
    ) -> Sequence[Value]:
        if domain not in scope.opsets:
            raise SourceError(f"{where}: the file names no opset for that domain", fix="export the model again")
        opset = scope.opsets[domain]

        decoded: dict[str, dict[str, torch.Tensor]] = {}

        def run_subgraph(graph: GraphProto, arguments: Sequence[Value]) -> list[Value]:
            label = f'"{graph.name}" in {node.op_type} "{node.name}"'
            if len(arguments) != len(graph.input):
                raise SourceError(f"{where}: its body takes {len(graph.input)} inputs, not {len(arguments)}")
            bound = {info.name: value for info, value in zip(graph.input, arguments, strict=True)}
            # All rounds of a loop share one copy of the body's initializers.
            shared = decoded.setdefault(graph.name, {})
            return self._run_graph(graph, Scope(label, scope.opsets, scope.bindings, bound, {}, shared, scope))

        def expand() -> tuple[Value, ...]:
            plain = [value.integers() if isinstance(value, Quantized) else value for value in inputs]
            body = function_body(node, domain, opset, plain, attributes, self._elem_types)
            if body is None:
                raise refusal(domain, node.op_type, opset, where)
            return self._run_function(body.function, plain, body.attributes, node.op_type)

        moved = carried(node, inputs, opset)
        if moved is not None:
            inputs = moved[1]

        operator = registry.find(domain, node.op_type, opset)
        call = OpCall(
            node, opset, where, inputs, attributes, self._recorder.constants, self._elem_types, self._path,
            run_subgraph, self._recorder.cause, expand, self._recorder.quantize,
            self._recorder.dynamic, self._recorder.note_dynamic, self._recorder.chosen,
        )  # fmt: skip
        try:
            result = operator(call) if operator is not None else expand()
        except EdgeshipError:
            raise
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise call.refuse("the shape of its result depends on the data, not only on shapes") from error
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise call.broken(f"its inputs do not fit: {reason[0]}") from error
        # A sequence value is a list as well: only operators with several outputs return a tuple.
        results = result if isinstance(result, tuple) else [result]
        return results if moved is None else [on_grid(value, moved[0]) for value in results]

    def _run_function(
        self,
        function: FunctionProto,
        inputs: Sequence[Value],
        attributes: Mapping[str, AttributeProto],
        name: str,
    ) -> tuple[Value, ...]:
        defaults = {a.name: a for a in function.attribute_proto}
        opsets = {normal_domain(entry.domain): int(entry.version) for entry in function.opset_import}
        # Bodies from the specification may name no standard opset: they mean the model's, or the newest.
        opsets = {"": NEWEST, **self._opsets, **opsets}
        scope = Scope(f"the function {name}", opsets, {**defaults, **attributes})
        scope.values = dict(zip(function.input, [*inputs, *[None] * len(function.input)], strict=False))
        self._run_nodes(function.node, scope, keep=list(function.output))
        # A body leaves an optional output out by not computing it.
        return tuple(self._peek(name, scope) for name in function.output)

    def _bind(self, node: NodeProto, outputs: Sequence[Value], scope: Scope, where: str) -> None:
        if len(outputs) < sum(1 for name in node.output if name):
            raise SourceError(f"{where}: it declares {len(node.output)} outputs and has {len(outputs)}")
        for name, value in zip(node.output, outputs, strict=False):
            if not name:
                continue
            scope.values[name] = value
            if not isinstance(value, torch.Tensor) or not is_constant(value):
                continue
            if node.op_type in _SAME_WEIGHT and node.input and node.input[0]:
                source = self._peek(node.input[0], scope)
                if isinstance(source, torch.Tensor):
                    self._recorder.constants.inherit(value, source)
            self._recorder.constants.name(value, name)

    def _peek(self, name: str, scope: Scope) -> Value:
        seen: Scope | None = scope
        while seen is not None:
            if name in seen.values:
                return seen.values[name]
            seen = seen.parent
        return None

    def _lookup(self, name: str, scope: Scope, where: str) -> Value:
        seen: Scope | None = scope
        while seen is not None:
            if name in seen.values:
                return seen.values[name]
            if name in seen.decoded:
                return seen.decoded[name]
            if name in seen.initializers:
                return self._read_initializer(name, seen)
            seen = seen.parent
        raise SourceError(
            f'{where} reads "{name}", which nothing before it produces',
            fix="check the file with onnx.checker: nodes must come in topological order",
        )

    def _read_initializer(self, name: str, scope: Scope) -> torch.Tensor:
        """The values of an initializer, in its own shape."""
        proto = scope.initializers[name]
        where = f'initializer "{name}"'
        if isinstance(proto, SparseTensorProto):
            value = read_sparse(proto, self._path, where)
        else:
            value = read_tensor(proto, self._path, where)
            self._tag(value, proto.data_type)
        self._recorder.constants.name(value, name, initializer=True)
        if scope.parent is None:
            scope.values[name] = value
        else:
            scope.decoded[name] = value
        return value

    def _tag(self, value: torch.Tensor, elem_type: int) -> None:
        if elem_type in SUB_BYTE_BITS:
            self._elem_types[value] = elem_type


def _bound(attributes: Sequence[AttributeProto], bindings: Mapping[str, AttributeProto]) -> Iterator[AttributeProto]:
    """Attributes with the references of a function body replaced by what the caller gave."""
    for attribute in attributes:
        if not attribute.ref_attr_name:
            yield attribute
        elif attribute.ref_attr_name in bindings:
            given = AttributeProto()
            given.CopyFrom(bindings[attribute.ref_attr_name])
            given.name = attribute.name
            yield given
