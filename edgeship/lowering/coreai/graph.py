"""The graph that Core AI's converter gets: hollow where weights were decided, in float16 when asked, and decomposed."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.ao.quantization.fx._decomposed  # registers the quantized_decomposed operators
from coreai_torch import get_decomp_table

from edgeship.errors import LoweringError
from edgeship.program.activations import insert_pairs

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node

    from edgeship.program.program import TorchProgram

Compute = Literal["float16", "float32"]

# A mask needs no more than this to vanish in a softmax, and a score added to it stays finite in float16.
MASK = -1e4
FLOAT16_MAX = 65504.0


def decomposed(program: TorchProgram, compute: Compute) -> ExportedProgram:
    """The program in the operators that Core AI's converter takes.

    Encoded weights are stride-0 placeholders; other weights, and the arithmetic, are in ``compute``. Inputs and outputs
    keep the dtypes of the signature.
    """
    exported = _with_state(program, torch.float16 if compute == "float16" else torch.float32)
    if program.activations:
        exported = insert_pairs(exported, program.activations)
    module = exported.module(check_guards=False)
    if compute == "float16":
        _compute_in_half(module)
    _separate_outputs(module)
    module.recompile()
    examples = program.example_inputs()
    with torch.no_grad():
        exported = torch.export.export(module, examples, strict=False)
    return cast("ExportedProgram", exported.run_decompositions(get_decomp_table()))


def _with_state(program: TorchProgram, dtype: torch.dtype) -> ExportedProgram:
    exported = copy.copy(program.exported)
    state: dict[str, torch.Tensor] = {}
    for name, old in program.exported.state_dict.items():
        tied = program.record.aliases.get(name, name)
        if tied in program.encoded:
            value = torch.zeros((), dtype=dtype).expand(old.shape)
        else:
            value = _converted(tied, program.weight(tied), dtype)
        state[name] = torch.nn.Parameter(value, requires_grad=False) if isinstance(old, torch.nn.Parameter) else value
    exported._state_dict = state
    return exported


def _converted(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    if dtype != torch.float16:
        return value.to(dtype)
    if bool((value > FLOAT16_MAX).any()):
        raise LoweringError(
            f"{name} has values beyond float16's {FLOAT16_MAX:g}", fix="lower in float32: lower/torch_to_coreai.compute"
        )
    return torch.where(value < -FLOAT16_MAX, MASK, value).to(torch.float16)


def _compute_in_half(module: GraphModule) -> None:
    """Cast float inputs to float16 and outputs back, and compute in float16 where the graph says float32."""
    aten = torch.ops.aten
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_function":
            node.args = tuple(_half_scalar(_half_dtype(item)) for item in node.args)
            node.kwargs = {key: _half_dtype(item) for key, item in node.kwargs.items()}
            if node.target == torch.ops.quantized_decomposed.dequantize_per_tensor.default:
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


def _half_scalar(value: Any) -> Any:
    # Masks are often filled with float32's smallest number, which float16 does not have.
    return MASK if isinstance(value, float) and value < -FLOAT16_MAX else value


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
