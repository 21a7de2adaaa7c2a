"""Walk a program node by node over all calibration batches at once, and let a visitor change each weight on the way.

Every layer sees inputs that the already changed layers before it made, as GPTQ (Frantar et al. 2022, arXiv:2210.17323)
wants. Only activations that a later node still reads are kept, so memory is a small multiple of one layer's activations
over all batches, not of the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from edgeship.errors import DataError
from edgeship.program.inventory import weight_nodes

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

    from edgeship.core.inventory import WeightUse
    from edgeship.program.program import TorchProgram


@dataclass(frozen=True)
class Layer:
    """One weight on the walk.

    Args:
        use: what the inventory says of it. node: the operator that reads it.
        weight: float32, its own shape. inputs: the operator's first input, one tensor a batch.
        evaluate: what the operator answers for batch number ``index`` with another weight in this one's place.
        bias: name of the operator's bias, when it has one that no other operator reads.
        wanted: ``inputs`` as the float model has them, when the walk was asked for them.
    """

    use: WeightUse
    node: Node
    weight: torch.Tensor
    inputs: tuple[torch.Tensor, ...]
    evaluate: Callable[[torch.Tensor, int], torch.Tensor]
    bias: str | None = None
    wanted: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True)
class Replacement:
    """What later layers should see instead of a weight and, when ``bias`` is given, of its operator's bias."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


Visitor = Callable[[Layer], "Replacement | None"]


def walk(
    program: TorchProgram,
    batches: Sequence[dict[str, Any]],
    visit: Visitor,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    *,
    reference: bool = False,
) -> None:
    """Run the program over ``batches``; before each operator with a weight, let ``visit`` replace the weight.

    Args:
        batches: inputs by name, NumPy, as `edgeship.data.batches` gives them.
        visit: called once a weight, in the order of the graph; returns what later layers should see, or None to
            leave it. A weight read by several operators is visited at the first.
        reference: run the float model beside it from the first change on, for `Layer.wanted`; twice time and memory.

    Raises:
        DataError: no batches, or an activation that is not finite.
    """
    import torch

    if not batches:
        raise DataError("calibration needs at least one sample", fix="give --calibration DATA")
    placeholders = {node: name for name, node in weight_nodes(program.exported).items()}
    uses = {use.name: use for use in program.record.inventory.weights}
    lifted = program.exported.graph_signature.inputs_to_lifted_tensor_constants
    graph = program.exported.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    user_names = iter(spec.name for spec in program.signature.inputs)
    values: dict[Node, list[Any]] = {}
    # What the float model has instead, for the nodes where that differs.
    floats: dict[Node, list[Any]] = {}
    shared: dict[Node, torch.Tensor] = {}
    for node in inputs:
        if node in placeholders:
            continue
        if node.name in lifted:
            shared[node] = cast("torch.Tensor", program.exported.constants[lifted[node.name]])
        else:
            name = next(user_names)
            values[node] = [torch.from_numpy(batch[name].copy()) for batch in batches]
    last_read = {arg: node for node in graph.nodes for arg in node.all_input_nodes}
    changed: dict[str, torch.Tensor] = {}
    steps = [node for node in graph.nodes if node.op == "call_function"]
    visited: set[str] = set()

    def weight_of(node: Node) -> torch.Tensor:
        name = placeholders[node]
        name = program.record.aliases.get(name, name)
        return changed[name] if name in changed else program.weight(name)

    def changes(node: Node) -> bool:
        return program.record.aliases.get(placeholders[node], placeholders[node]) in changed

    def unchanged(node: Node) -> torch.Tensor:
        return program.weight(program.record.aliases.get(placeholders[node], placeholders[node]))

    def call(node: Node, index: int, replaced: dict[Node, torch.Tensor], *, float_path: bool = False) -> Any:
        def look(arg: Node) -> Any:
            if arg in replaced:
                return replaced[arg]
            if float_path and arg in floats:
                return floats[arg][index]
            return shared[arg] if arg in shared else values[arg][index]

        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), look)
        return cast("Any", node.target)(*args, **kwargs)

    with torch.no_grad():
        for done, node in enumerate(steps):
            loaded = {arg: weight_of(arg) for arg in node.all_input_nodes if arg in placeholders}
            original = {arg: unchanged(arg) for arg in loaded} if reference else {}
            for arg in loaded:
                name = program.record.aliases.get(placeholders[arg], placeholders[arg])
                use = uses.get(placeholders[arg])
                if use is None or use.op == "other" or name in visited or not node.all_input_nodes:
                    continue
                first = next((item for item in node.all_input_nodes if item in values), None)
                # A table that is also the head (tied) is met where it multiplies, not where its rows are looked up.
                if first is None or (use.op == "linear" and node.target != torch.ops.aten.linear.default):
                    continue
                visited.add(name)
                progress(done, len(steps), name)

                def evaluate(
                    weight: torch.Tensor,
                    index: int,
                    node: Node = node,
                    arg: Node = arg,
                    loaded: dict[Node, torch.Tensor] = loaded,
                ) -> torch.Tensor:
                    return cast("torch.Tensor", call(node, index, {**loaded, arg: weight}))

                bias = _bias_of(node, arg)
                named = placeholders[bias] if bias is not None and bias in placeholders else None
                wanted = tuple(floats.get(first, values[first])) if reference else None
                layer = Layer(use, node, loaded[arg].float(), tuple(values[first]), evaluate, named, wanted)
                replacement = visit(layer)
                if replacement is not None:
                    changed[name] = loaded[arg] = replacement.weight
                    if replacement.bias is not None and bias is not None and named is not None:
                        changed[named] = loaded[bias] = replacement.bias
            if reference and (any(arg in floats for arg in node.all_input_nodes) or any(map(changes, loaded))):
                floats[node] = [call(node, index, original, float_path=True) for index in range(len(batches))]
            values[node] = [call(node, index, loaded) for index in range(len(batches))]
            _refuse_not_finite(node, values[node])
            for arg in node.all_input_nodes:
                if last_read.get(arg) is node:
                    values.pop(arg, None)
                    floats.pop(arg, None)


def _bias_of(node: Node, weight: Node) -> Node | None:
    """The third argument of a linear or convolution, when this operator alone reads it."""
    from torch.fx import Node

    bias = node.args[2] if len(node.args) > 2 else None
    own = isinstance(bias, Node) and len(bias.users) == 1 and node.args[1] is weight
    return cast("Node", bias) if own else None


def _refuse_not_finite(node: Node, results: Sequence[Any]) -> None:
    import torch

    for result in results:
        if isinstance(result, torch.Tensor) and result.is_floating_point() and bool(torch.isnan(result).any()):
            raise DataError(f"calibration makes NaN at {node.name}", fix="check the calibration data for outliers")
