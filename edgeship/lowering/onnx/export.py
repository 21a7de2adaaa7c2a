"""Export the graph of a torch program to ONNX IR, with its weights as inputs so that no optimizer touches them."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgeship.compat.exchange import log_level
from edgeship.errors import LoweringError, UnsupportedOpError
from edgeship.lowering.onnx.optimizer import optimize
from edgeship.lowering.operators import with_short_sorts
from edgeship.program.activations import insert_pairs
from edgeship.program.collector import few_collections

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Node

    from edgeship.program.program import TorchProgram

OPSET = 21
# Constants up to this many elements stay visible to the optimizer: shapes, scalars, small tables.
MAX_VISIBLE_ELEMENTS = 1024


def export_graph(program: TorchProgram) -> tuple[ir.Model, dict[str, ir.Value]]:
    """The optimized graph, and its weights by torch name: initializers without content yet.

    Raises:
        UnsupportedOpError: an operator has no ONNX form; names it and where it sits.
        LoweringError: the exporter failed otherwise.
    """
    import torch

    from edgeship.compat.torch import onnx_table_kept, quick_decompositions

    hollow = _hollow(program)
    with quiet(), few_collections(), quick_decompositions(), onnx_table_kept(OPSET):
        try:
            exported = torch.onnx.export(hollow, (), dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
        except torch.onnx.errors.OnnxExporterError as error:
            raise explained(error, hollow) from error
        if exported is None:
            raise LoweringError("the ONNX exporter returned nothing", fix="report this as a bug")
        model: ir.Model = exported.model
        weights = _hide_weights(model, program)
        _optimize(model, static=bool(program.activations))
    for value in weights.values():
        model.graph.inputs.remove(value)
    _rename_ends(model, program)
    forget_origins(model)
    return model, weights


def _hollow(program: TorchProgram) -> ExportedProgram:
    """The program with weights as stride-0 placeholders, except small constants that the optimizer should see."""
    from edgeship.compat.torch import replaced

    state: dict[str, Any] = {}
    for name, value in program.exported.state_dict.items():
        state[name] = program.weight(name) if _visible(program, name, value) else value
    hollow = with_short_sorts(replaced(program.exported, state_dict=state))
    if program.activations:
        return insert_pairs(hollow, program.activations)
    from edgeship.lowering.onnx.rewrites import in_onnx_operators

    return in_onnx_operators(hollow)


def _visible(program: TorchProgram, name: str, value: torch.Tensor) -> bool:
    if program.record.aliases.get(name, name) in program.encoded:
        return False
    return not _is_parameter(value) and (value.numel() <= MAX_VISIBLE_ELEMENTS or not value.is_floating_point())


def _is_parameter(value: torch.Tensor) -> bool:
    import torch

    return isinstance(value, torch.nn.Parameter)


def _hide_weights(model: ir.Model, program: TorchProgram) -> dict[str, ir.Value]:
    """Turn each weight's initializer into a graph input; tied names become one value."""
    graph = model.graph
    weights: dict[str, ir.Value] = {}
    for name, held in program.exported.state_dict.items():
        value = graph.initializers.get(name)
        if value is None or _visible(program, name, held):
            continue
        del graph.initializers[name]
        value.const_value = None
        main = program.record.aliases.get(name, name)
        if main in weights:
            value.replace_all_uses_with(weights[main])
            continue
        value.name = main
        weights[main] = value
        graph.inputs.append(value)
    return weights


def _optimize(model: ir.Model, static: bool) -> None:
    """Fold shapes and constants, and fuse what onnxscript knows; between static pairs there is nothing to fuse."""
    import onnxscript.optimizer
    from onnx_ir.passes import Sequential, common

    if not static:
        optimize(model)
        return
    # The rules alone take longer than the rest of the lowering on graphs three times as long.
    common.InlinePass()(model)
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.NameFixPass(),
    )(model)


def _rename_ends(model: ir.Model, program: TorchProgram) -> None:
    """Give inputs and outputs the signature's names. An output that is an input, or twice an output, is a copy."""
    import onnx_ir as ir

    graph = model.graph
    for taken in [*graph.inputs, *(value for node in graph for value in node.outputs)]:
        if taken.name in {spec.name for spec in (*program.signature.inputs, *program.signature.outputs)}:
            taken.name = f"{taken.name}_value"
    for value, spec in zip(graph.inputs, program.signature.inputs, strict=True):
        value.name = spec.name
    seen: set[int] = set()
    for index, (value, spec) in enumerate(zip(list(graph.outputs), program.signature.outputs, strict=True)):
        if id(value) in seen or value.producer() is None:
            node = ir.node("Identity", [value], name=f"copy_{spec.name}")
            graph.append(node)
            (copied,) = node.outputs
            copied.type, copied.shape = value.type, value.shape
            graph.outputs[index] = value = copied
        value.name = spec.name
        seen.add(id(value))


def forget_origins(model: ir.Model) -> None:
    """Drop stack traces and the exporter's notes: they hold paths of this machine and change from run to run."""
    model.producer_name, model.producer_version = "edgeship", None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def explained(error: BaseException, program: ExportedProgram | None) -> LoweringError | UnsupportedOpError:
    """The exporter's failure in one line: which operator, and where."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    text = " ".join(str(cause) for cause in causes)
    missing = re.search(
        r"No ONNX function found for <?(?:OpOverload\(op='([\w.]+)', overload='(\w+)'\)|([\w.:]+))", text
    )
    if missing:
        op = missing.group(3) or f"{missing.group(1)}.{missing.group(2)}"
        return UnsupportedOpError(
            f"ONNX has no form of {op}" + ("" if program is None else f" (at {_where(program, op)})"),
            fix="write that step with other operators, or leave out runtime onnx",
        )
    failing = re.search(r"Error when translating node %(\w+)", text)
    where = f" at {failing.group(1)}" if failing else ""
    reason = next((line for line in str(causes[-1]).splitlines() if line.strip()), type(causes[-1]).__name__)
    return LoweringError(f"the ONNX exporter failed{where}: {reason[:300]}", fix="write that step with other operators")


def _where(program: ExportedProgram, op: str) -> str:
    """Module path and node name of the first use of ``op``; just the name when the path is not recorded."""
    for node in program.graph.nodes:
        if node.op == "call_function" and str(node.target) in (op, op.removesuffix(".default")):
            return _place(node)
    # Decomposition leaves names such as aten._linalg_svd for what the program calls aten.linalg_svd.
    wanted = op.split(".")[1].strip("_") if "." in op else op
    for node in program.graph.nodes:
        if node.op == "call_function" and wanted in str(node.target):
            return _place(node)
    return "a decomposed operator"


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter warns of packages we do not use (torchvision) at each call."""
    with log_level("torch.onnx", logging.ERROR), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _place(node: Node) -> str:
    """Module path and node name; just the name when the path is not recorded."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return f"{path}, node {node.name}" if path else f"node {node.name}"
