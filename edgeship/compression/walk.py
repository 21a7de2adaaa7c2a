"""Walk a program node by node over all calibration batches at once, and let a visitor change each weight on the way.

Every layer sees inputs that the already changed layers before it made, as GPTQ (Frantar et al. 2022, arXiv:2210.17323)
wants. Only activations that a later node still reads are kept, so memory is a small multiple of one layer's activations
over all batches, not of the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from edgeship.errors import DataError
from edgeship.program.inventory import weight_nodes

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

    from edgeship.core.inventory import WeightUse
    from edgeship.program.program import TorchProgram

    # For each node what it answers, one entry a batch.
    Values = dict[Node, list[Any]]


@dataclass(frozen=True)
class Layer:
    """One weight on the walk.

    Args:
        use: what the inventory says of it. node: the operator that reads it.
        weight: float32, its own shape. inputs: the operator's first input, one tensor a batch.
        answers: the model's float outputs for some batches, by their numbers, with another weight in this one's place.
            Starts from here, where this operator alone reads the weight.
        bias: name of the operator's bias, when it has one that no other operator reads.
        wanted: ``inputs`` as the float model has them, when the walk was asked for them.
    """

    use: WeightUse
    node: Node
    weight: torch.Tensor
    inputs: tuple[torch.Tensor, ...]
    answers: Callable[[torch.Tensor, Sequence[int]], list[list[torch.Tensor]]]
    bias: str | None = None
    wanted: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True)
class Replacement:
    """What later layers should see instead of a weight and, when ``bias`` is given, of its operator's bias."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


Visitor = Callable[[Layer], "Replacement | None"]


class Steps:
    """The operators of a program in order, run over batches one operator at a time.

    Args:
        program: with its weights. batches: inputs by name, NumPy, as `edgeship.data.batches` gives them.

    Raises:
        DataError: no batches.
    """

    def __init__(self, program: TorchProgram, batches: Sequence[Mapping[str, Any]]) -> None:
        if not batches:
            raise DataError("running the model needs at least one sample", fix="give --calibration DATA")
        aliases = program.record.aliases
        graph, ends = program.exported.graph, program.exported.graph_signature
        self.program = program
        # Placeholder of a weight -> the name that the weight is stored under.
        self.weights = {node: aliases.get(name, name) for name, node in weight_nodes(program.exported).items()}
        self.nodes = [node for node in graph.nodes if node.op == "call_function"]
        self._batches = batches
        self._last_read = {arg: node for node in graph.nodes for arg in node.all_input_nodes}
        lifted = ends.inputs_to_lifted_tensor_constants
        inputs = [node for node in graph.nodes if node.op == "placeholder" and node not in self.weights]
        self._constants = {
            node: program.exported.constants[lifted[node.name]] for node in inputs if node.name in lifted
        }
        taken = [node for node in inputs if node not in self._constants]
        self._inputs = dict(zip(taken, (spec.name for spec in program.signature.inputs), strict=True))
        found = {node.name: node for node in graph.nodes}
        self._outputs = [found[name] for name in ends.user_outputs if name in found]

    def inputs(self, numbers: Iterable[int]) -> Values:
        """The model's inputs in the batches of these numbers."""
        import torch

        chosen = [self._batches[number] for number in numbers]
        return {node: [torch.from_numpy(batch[name].copy()) for batch in chosen] for node, name in self._inputs.items()}

    def readers(self, name: str) -> list[Node]:
        """The operators that read a weight, under any of its names."""
        placeholders = {node for node, weight in self.weights.items() if weight == name}
        return [node for node in self.nodes if placeholders.intersection(node.all_input_nodes)]

    def weights_of(self, node: Node, changed: Mapping[str, torch.Tensor]) -> dict[Node, torch.Tensor]:
        """The weights that an operator reads, by placeholder."""
        names = {arg: self.weights[arg] for arg in node.all_input_nodes if arg in self.weights}
        return {arg: changed[name] if name in changed else self.program.weight(name) for arg, name in names.items()}

    def call(self, node: Node, index: int, weights: Mapping[Node, torch.Tensor], *values: Mapping[Node, Any]) -> Any:
        """What an operator answers in one batch; its arguments are looked up in each of ``values`` in turn."""
        import torch

        def look(arg: Node) -> Any:
            if arg in weights:
                return weights[arg]
            if arg in self._constants:
                return self._constants[arg]
            return next(known[arg] for known in values if arg in known)[index]

        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), look)
        return cast("Any", node.target)(*args, **kwargs)

    def read_last(self, node: Node) -> list[Node]:
        """What nobody reads after this operator."""
        return [arg for arg in node.all_input_nodes if self._last_read.get(arg) is node]

    def answers(self, start: int, values: Values, changed: Mapping[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        """The model's float outputs, one list a batch, from operator number ``start`` on.

        Args:
            values: what the operators before it answered, as far as others still read it. changed: other weights.
        """
        count = len(next(iter(values.values())))
        made: Values = {}
        for node in self.nodes[start:]:
            weights = self.weights_of(node, changed)
            made[node] = [self.call(node, index, weights, made, values) for index in range(count)]
            for arg in self.read_last(node):
                made.pop(arg, None)
        ends = [made.get(node, values.get(node)) for node in self._outputs]
        found = [[end[index] for end in ends if end is not None] for index in range(count)]
        return [[item for item in outputs if item.is_floating_point()] for outputs in found]


def walk(
    program: TorchProgram,
    batches: Sequence[Mapping[str, Any]],
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

    steps = Steps(program, batches)
    uses = {use.name: use for use in program.record.inventory.weights}
    values = steps.inputs(range(len(batches)))
    # What the float model has instead, for the nodes where that differs.
    floats: Values = {}
    changed: dict[str, torch.Tensor] = {}
    visited: set[str] = set()
    count = range(len(batches))
    with torch.no_grad():
        for place, node in enumerate(steps.nodes):
            loaded = steps.weights_of(node, changed)
            for arg in list(loaded):
                name = steps.weights[arg]
                use = uses.get(name)
                if use is None or use.op == "other" or name in visited:
                    continue
                first = next((item for item in node.all_input_nodes if item in values), None)
                # A table that is also the head (tied) is met where it multiplies, not where its rows are looked up.
                if first is None or (use.op == "linear" and node.target != torch.ops.aten.linear.default):
                    continue
                visited.add(name)
                progress(place, len(steps.nodes), name)
                bias = _bias_of(node, arg)
                named = steps.weights.get(bias) if bias is not None else None
                replacement = visit(
                    Layer(
                        use,
                        node,
                        loaded[arg].float(),
                        tuple(values[first]),
                        _answers(steps, name, place, values, changed),
                        named,
                        tuple(floats.get(first, values[first])) if reference else None,
                    )
                )
                if replacement is not None:
                    changed[name] = loaded[arg] = replacement.weight
                    if replacement.bias is not None and bias is not None and named is not None:
                        changed[named] = loaded[bias] = replacement.bias
            moved = any(arg in floats for arg in node.all_input_nodes)
            if reference and (moved or any(steps.weights[arg] in changed for arg in loaded)):
                plain = {
                    arg: program.weight(steps.weights[arg]) if steps.weights[arg] in changed else weight
                    for arg, weight in loaded.items()
                }
                floats[node] = [steps.call(node, index, plain, floats, values) for index in count]
            values[node] = [steps.call(node, index, loaded, values) for index in count]
            _refuse_not_finite(node, values[node])
            for arg in steps.read_last(node):
                values.pop(arg, None)
                floats.pop(arg, None)


def _answers(
    steps: Steps, name: str, place: int, values: Values, changed: Mapping[str, torch.Tensor]
) -> Callable[[torch.Tensor, Sequence[int]], list[list[torch.Tensor]]]:
    """`Layer.answers` of a weight that is met at operator number ``place``."""

    def answers(weight: torch.Tensor, numbers: Sequence[int]) -> list[list[torch.Tensor]]:
        with_it = {**changed, name: weight}
        if len(steps.readers(name)) > 1:
            return steps.answers(0, steps.inputs(numbers), with_it)
        here = {node: [found[number] for number in numbers] for node, found in values.items()}
        return steps.answers(place, here, with_it)

    return answers


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
