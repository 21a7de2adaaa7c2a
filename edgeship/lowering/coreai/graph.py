"""The graph that Core AI's converter gets: hollow where weights were decided, in float16 when asked, and decomposed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from edgeship.compat.torch import pair_operators
from edgeship.lowering.coreai.rewrites import in_coreai_operators
from edgeship.lowering.grids import quantized, quantizers
from edgeship.lowering.operators import with_short_sorts
from edgeship.program.activations import insert_pairs
from edgeship.program.hollow import fit_scalars, hollow
from edgeship.program.provenance import keep_places
from edgeship.program.wide import wide_nodes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram
    from torch.fx import Graph, GraphModule, Node

    from edgeship.program.program import TorchProgram

Compute = Literal["float16", "float32"]

# Under this name a quantize or dequantize operator's metadata has its activation.
ACTIVATION = "activation"


def decomposed(program: TorchProgram, compute: Compute) -> ExportedProgram:
    """The program in the operators that Core AI's converter takes; quantize operators carry their activation's name.

    Encoded weights are stride-0 placeholders; other weights, and the arithmetic, are in ``compute``. Inputs and outputs
    keep the dtypes of the signature.
    """
    half = compute == "float16"
    exported = with_short_sorts(hollow(program, torch.float16 if half else torch.float32, for_float16=half))
    if program.activations:
        exported = insert_pairs(exported, program.activations)
    activations = quantized(exported.graph)
    module = exported.module(check_guards=False)
    if half:
        _keep_wide_constants(module, program)
        _to_half(module)
    _separate_outputs(module)
    module.recompile()
    examples = program.example_inputs()
    with torch.no_grad():
        exported = torch.export.export(module, examples, strict=False)
    keep_places(program.exported.graph, exported.graph)
    lowered = in_coreai_operators(exported)
    for activation, node in quantizers(lowered.graph, activations, "Core AI").items():
        for operator in (node, *node.users):
            operator.meta[ACTIVATION] = activation
    return lowered


def computed_in_half(exported: ExportedProgram, examples: tuple[Any, ...]) -> ExportedProgram:
    """A program in float16, its state included; inputs and outputs keep their dtypes, hollow weights stay hollow."""
    for held in (exported.state_dict, exported.constants):
        for name, value in list(held.items()):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                half = _halved(value)
                is_parameter = isinstance(value, torch.nn.Parameter)
                held[name] = torch.nn.Parameter(half, requires_grad=False) if is_parameter else half
    module = exported.module(check_guards=False)
    _to_half(module)
    module.recompile()
    with torch.no_grad():
        return torch.export.export(module, examples, strict=False)


def _to_half(module: GraphModule) -> None:
    wide = wide_nodes(module.graph)
    fit_scalars(module.graph)
    _halve_new(module.graph)
    _compute_in_half(module, wide)
    _widen(module.graph, wide)


def _keep_wide_constants(module: GraphModule, program: TorchProgram) -> None:
    """Constants that only operators in float32 read stay in float32."""
    wide = wide_nodes(module.graph)
    for node in module.graph.nodes:
        name = str(node.target)
        tied = program.record.aliases.get(name, name)
        if node.op != "get_attr" or tied in program.encoded or name not in program.exported.state_dict:
            continue
        if node.users and all(user in wide for user in node.users):
            owner, _, leaf = name.rpartition(".")
            held = program.weight(tied)
            if held.is_floating_point():
                kept = torch.nn.Parameter(held, requires_grad=False)
                is_parameter = isinstance(getattr(module.get_submodule(owner), leaf), torch.nn.Parameter)
                setattr(module.get_submodule(owner), leaf, kept if is_parameter else held)


def _widen(graph: Graph, wide: Mapping[Node, None]) -> None:
    """Cast to float32 before the operators that need it, and back behind them."""
    aten = torch.ops.aten
    widened: dict[Node, Node] = {}
    for node in wide:
        for given in node.all_input_nodes:
            value = given.meta.get("val")
            cast_of = given.args[0] if given.target == aten._to_copy.default else None
            if given in wide or (given.op == "get_attr" and all(user in wide for user in given.users)):
                continue
            if getattr(cast_of, "op", "") == "placeholder" and value is None:
                node.replace_input_with(given, cast("Node", cast_of))
                continue
            if isinstance(value, torch.Tensor) and not value.is_floating_point():
                continue
            if given not in widened:
                with graph.inserting_after(given):
                    widened[given] = graph.call_function(aten._to_copy.default, (given,), {"dtype": torch.float32})
            node.replace_input_with(given, widened[given])
    for node in wide:
        others = [user for user in node.users if user not in wide and user.op != "output"]
        value = node.meta.get("val")
        if not others or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        with graph.inserting_after(node):
            half = graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.float16})
        for user in others:
            if user.target == aten._to_copy.default and user.kwargs.get("dtype") == torch.float32:
                continue
            user.replace_input_with(node, half)


def _halved(value: torch.Tensor) -> torch.Tensor:
    """In float16; one number seen from everywhere stays one. Any shape."""
    if value.numel() > 1 and not any(value.stride()):
        return value.as_strided((), ()).half().expand(value.shape)
    return value.half()


def _halve_new(graph: Graph) -> None:
    """Cast to float16 what is made of plain numbers or integers alone, such as ``where(mask, 0.0, -1e4)``."""
    for node in list(graph.nodes):
        made = node.meta.get("val")
        if node.op != "call_function" or not isinstance(made, torch.Tensor) or made.dtype != torch.float32:
            continue
        # Weights, casts that were just put in, and operators of several results are floats.
        given = [item.meta.get("val") for item in node.all_input_nodes]
        if any(not isinstance(item, torch.Tensor) or item.is_floating_point() for item in given):
            continue
        with graph.inserting_after(node):
            half = graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": torch.float16})
        node.replace_all_uses_with(half, delete_user_cb=lambda user, keep=half: user is not keep)


def _compute_in_half(module: GraphModule, wide: Mapping[Node, None]) -> None:
    """Cast float inputs to float16 and outputs back, and compute in float16 where the graph says float32."""
    aten = torch.ops.aten
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node not in wide:
            node.args = tuple(_half_dtype(item) for item in node.args)
            node.kwargs = {key: _half_dtype(item) for key, item in node.kwargs.items()}
            if node.target == pair_operators().dequantize_per_tensor.default:
                node.kwargs = {**node.kwargs, "out_dtype": torch.float16}
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor) and value.is_floating_point():
            after = [item for item in graph.nodes if item.op == "placeholder"][-1]
            with graph.inserting_after(after):
                half = graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.float16})
            node.replace_all_uses_with(half, delete_user_cb=lambda user, keep=half: user is not keep)
    output = graph.output_node()
    results = []
    for result in _results(output):
        value = result.meta.get("val")
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            results.append(result)
            continue
        with graph.inserting_before(output):
            results.append(graph.call_function(aten._to_copy.default, (result,), {"dtype": torch.float32}))
    output.args = (tuple(results),)


def _half_dtype(value: Any) -> Any:
    return torch.float16 if value in (torch.float32, torch.float64) and isinstance(value, torch.dtype) else value


def _results(output: Node) -> list[Node]:
    return list(cast("tuple[Node, ...]", output.args[0]))


def _separate_outputs(module: GraphModule) -> None:
    """Give every output a node of its own: the converter keeps them in a table by node."""
    output = module.graph.output_node()
    seen: set[Node] = set()
    results = []
    for result in _results(output):
        if result in seen or result.op != "call_function":
            with module.graph.inserting_before(output):
                result = module.graph.call_function(torch.ops.aten.clone.default, (result,))
        seen.add(result)
        results.append(result)
    output.args = (tuple(results),)
