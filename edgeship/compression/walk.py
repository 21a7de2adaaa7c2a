"""Walk a program layer by layer over all calibration batches, and let a visitor change each weight on the way.

Every layer sees inputs that the already changed layers before it made, as GPTQ (Frantar et al. 2022, arXiv:2210.17323)
wants. Between two layers the operators run batch by batch, and of a batch only what a later operator still reads is
held (`edgeship.compression.held`): memory does not grow with the number of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgeship.compression.held import HELD_BYTES, Batches, Shelf
from edgeship.compression.products import linear
from edgeship.errors import DataError
from edgeship.program.inventory import weight_nodes

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

    from edgeship.core.inventory import WeightUse
    from edgeship.program.program import TorchProgram

    # For each node what it answers, one entry a batch.
    Values = dict[Node, Sequence[Any]]
    Answers = Callable[[torch.Tensor, Sequence[int]], list[list[torch.Tensor]]]


@dataclass(frozen=True)
class Layer:
    """One weight on the walk.

    Args:
        use: what the inventory says of it. node: the operator that reads it.
        weight: float32, its own shape.
        inputs: the operator's first input, one tensor a batch. Readable during the visit only.
        source: the node that makes ``inputs``: layers with the same one read the same numbers.
        bias: name of the operator's bias, when it has one that no other operator reads.
        wanted: ``inputs`` as the float model has them, when the walk was asked for them.
        answers: the model's float outputs for some batches, by their numbers, with another weight in this one's place,
            when the walk was asked for it. Starts from here, where this operator alone reads the weight.
    """

    use: WeightUse
    node: Node
    weight: torch.Tensor
    inputs: Sequence[torch.Tensor]
    source: Node
    bias: str | None = None
    wanted: Sequence[torch.Tensor] | None = None
    answers: Answers | None = None


@dataclass(frozen=True)
class Replacement:
    """What later layers should see instead of a weight and, when ``bias`` is given, of its operator's bias.

    ``weight`` may be a function that makes it: it is called where an operator reads the weight, so that what is large
    need not be kept.
    """

    weight: torch.Tensor | Callable[[], torch.Tensor]
    bias: torch.Tensor | None = None


Visitor = Callable[[Layer], "Replacement | None"]


class Operators:
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
        lifted = ends.inputs_to_lifted_tensor_constants
        self.program = program
        self._batches = batches
        # Placeholder of a weight -> the name that the weight is stored under.
        self.weights = {node: aliases.get(name, name) for name, node in weight_nodes(program.exported).items()}
        self.nodes: list[Node] = []
        self.constants: dict[Node, torch.Tensor] = {}
        # Whatever overwrites an entry reads the value later, so that the last reader stays.
        self._last_read: dict[Node, Node] = {}
        taken: list[Node] = []
        for node in graph.nodes:
            self._last_read.update(dict.fromkeys(node.all_input_nodes, node))
            if node.op == "call_function":
                self.nodes.append(node)
            elif node.op == "placeholder" and node.name in lifted and node not in self.weights:
                self.constants[node] = program.exported.constants[lifted[node.name]]
            elif node.op == "placeholder" and node not in self.weights:
                taken.append(node)
        # Placeholder of an input -> its name in the signature.
        self.taken = dict(zip(taken, (spec.name for spec in program.signature.inputs), strict=True))
        by_name = {node.name: node for node in graph.nodes}
        self.outputs = [by_name[name] for name in ends.user_outputs if name in by_name]

    def input(self, node: Node, number: int) -> torch.Tensor:
        """One input of the model in one batch. The shape is the signature's."""
        import torch

        return torch.from_numpy(self._batches[number][self.taken[node]].copy())

    def inputs(self, numbers: Iterable[int]) -> Values:
        """The model's inputs in the batches of these numbers."""
        chosen = list(numbers)
        values: Values = {}
        for node in self.taken:
            values[node] = [self.input(node, number) for number in chosen]
        return values

    def readers(self, name: str) -> list[Node]:
        """The operators that read a weight, under any of its names."""
        # Tied weights have several.
        placeholders = {node for node, weight in self.weights.items() if weight == name}
        return [node for node in self.nodes if placeholders.intersection(node.all_input_nodes)]

    def weights_of(self, node: Node, changed: Mapping[str, torch.Tensor]) -> dict[Node, torch.Tensor]:
        """The weights that an operator reads, by placeholder. Each in its own shape."""
        found: dict[Node, torch.Tensor] = {}
        for arg in node.all_input_nodes:
            name = self.weights.get(arg)
            if name is not None:
                found[arg] = changed[name] if name in changed else self.program.weight(name)
        return found

    def call(self, node: Node, weights: Mapping[Node, torch.Tensor], find: Callable[[Node], Any]) -> Any:
        """What an operator answers; ``find`` gives what others have answered. Values have the shapes of the graph."""
        import torch

        def look(arg: Node) -> Any:
            if arg in weights:
                return weights[arg]
            if arg in self.constants:
                return self.constants[arg]
            return find(arg)

        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), look)
        return _apply(node, args, kwargs)

    def read_last(self, node: Node) -> list[Node]:
        """What nobody reads after this operator."""
        return [arg for arg in node.all_input_nodes if self._last_read.get(arg) is node]

    def answers(self, start: int, values: Values, changed: Mapping[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        """The model's float outputs, one list a batch, from operator number ``start`` on.

        Outputs have the shapes of the signature.

        Args:
            values: what the operators before it answered, as far as others still read it. changed: other weights.
        """
        count = len(next(iter(values.values())))
        made: Values = {}

        def found_in(index: int) -> Callable[[Node], Any]:
            return lambda arg: (made if arg in made else values)[arg][index]

        for node in self.nodes[start:]:
            weights = self.weights_of(node, changed)
            made[node] = [self.call(node, weights, found_in(index)) for index in range(count)]
            for arg in self.read_last(node):
                made.pop(arg, None)
        answers: list[list[torch.Tensor]] = [[] for _ in range(count)]
        for node in self.outputs:
            for outputs, value in zip(answers, made.get(node, values.get(node, ())), strict=False):
                if value.is_floating_point():
                    outputs.append(value)
        return answers


@dataclass(frozen=True)
class Meeting:
    """Where a weight is met. ``arg``: its placeholder."""

    node: Node
    arg: Node
    use: WeightUse


@dataclass(frozen=True)
class Stop:
    """Where the walk stands still: all that is in front of operator number ``place`` has run.

    Linear layers that read the same ``source`` are met together, whatever stands between them.
    """

    place: int
    source: Node
    meetings: list[Meeting] = field(default_factory=list)


def walk(
    program: TorchProgram,
    batches: Sequence[Mapping[str, Any]],
    visit: Visitor,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    *,
    reference: bool = False,
    answers: bool = False,
    numbers_only: bool = True,
    folder: Path | None = None,
) -> None:
    """Run the program over ``batches``; before each operator with a weight, let ``visit`` replace the weight.

    Args:
        batches: inputs by name, NumPy, as `edgeship.data.batches` gives them.
        visit: called once a weight, in the order of the graph but that linear layers with the same inputs are met
            together; returns what later layers should see, or None to leave it. A weight read by several operators is
            visited at the first.
        progress: called before each visit with how many there were and will be.
        reference: run the float model beside it from the first change on, for `Layer.wanted`; twice time and memory.
        answers: offer `Layer.answers`, which keeps every changed weight.
        numbers_only: refuse batches that make NaN. Of inputs that nobody gave, zeros say, that is the model's answer.
        folder: where activations go that do not fit into memory; the system's temporary folder when None.

    Raises:
        DataError: no batches, or a value that is not a number where ``numbers_only``.
    """
    import torch

    with torch.no_grad():
        _Walk(Operators(program, batches), len(batches), reference, answers, numbers_only, folder).run(visit, progress)


class _Walk:
    """The state of one walk: where it is, and what is held there."""

    def __init__(
        self, operators: Operators, count: int, reference: bool, answers: bool, numbers_only: bool, folder: Path | None
    ) -> None:
        self.operators = operators
        self.count = count
        self.reference = reference
        self.answers = answers
        self.numbers_only = numbers_only
        self.stops = stops_of(operators)
        met = {operators.weights[meeting.arg] for stop in self.stops for meeting in stop.meetings}
        self.last, self.needed = reach(operators, self.stops, answers)
        self.fixed_nodes = _independent(operators, met) & self.needed
        self.fixed: dict[Node, Any] = {}
        self.shelf = Shelf(count, HELD_BYTES // (1 + reference), folder)
        # What the float model has instead, for the nodes where that differs.
        self.floats = Shelf(count, HELD_BYTES // (1 + reference), folder)
        self.moved: set[Node] = set()
        self.replaced: set[str] = set()
        self.changed: dict[str, torch.Tensor | Callable[[], torch.Tensor]] = {}
        self.at = 0

    def run(self, visit: Visitor, progress: Callable[[int, int, str], None]) -> None:
        """Go from stop to stop; nothing behind the last one is run."""
        total, done = sum(len(stop.meetings) for stop in self.stops), 0
        try:
            for stop in self.stops:
                self._advance(stop.place)
                for meeting in stop.meetings:
                    progress(done, total, meeting.use.name)
                    self._meet(stop, meeting, visit)
                    done += 1
        finally:
            self.shelf.close()
            self.floats.close()

    def _meet(self, stop: Stop, meeting: Meeting, visit: Visitor) -> None:
        operators, node, arg = self.operators, meeting.node, meeting.arg
        name = operators.weights[arg]
        bias = _bias_of(node, arg)
        named = operators.weights.get(bias) if bias is not None else None
        layer = Layer(
            meeting.use,
            node,
            operators.program.weight(name).float(),
            self._batches(stop.source),
            stop.source,
            named,
            self._batches(stop.source, wanted=True) if self.reference else None,
            self._answers(name, stop.place) if self.answers else None,
        )
        replacement = visit(layer)
        if replacement is None:
            return
        self.replaced.add(name)
        self.changed[name] = replacement.weight
        if replacement.bias is not None and named is not None:
            self.replaced.add(named)
            self.changed[named] = replacement.bias

    def _advance(self, to: int) -> None:
        """Run the operators in front of number ``to``, batch by batch."""
        nodes = [node for node in self.operators.nodes[self.at : to] if node in self.needed]
        loaded, plain = self._weights(nodes)
        for node in nodes:
            if node in self.fixed_nodes:
                self.fixed[node] = self.operators.call(node, loaded, self.fixed.__getitem__)
            elif self.reference and self._differs(node):
                self.moved.add(node)
        nodes = [node for node in nodes if node not in self.fixed_nodes]
        for index in range(self.count):
            self._run_batch(nodes, index, to, loaded, plain)
        for shelf in (self.shelf, self.floats):
            for node in shelf:
                if self.last[node] < to:
                    shelf.drop(node)
        for node in [node for node in self.fixed if self.last[node] < to]:
            del self.fixed[node]
        self.moved = {node for node in self.moved if self.last[node] >= to}
        if not self.answers:
            later: set[str | None] = set()
            for node in self._later(to):
                later.update(self.operators.weights.get(arg) for arg in node.all_input_nodes)
            self.changed = {name: value for name, value in self.changed.items() if name in later}
        self.at = to

    def _later(self, place: int) -> list[Node]:
        return [node for node in self.operators.nodes[place:] if node in self.needed]

    def _run_batch(
        self,
        nodes: Sequence[Node],
        index: int,
        to: int,
        loaded: Mapping[Node, torch.Tensor],
        plain: Mapping[Node, torch.Tensor],
    ) -> None:
        """One batch through some operators; what is read behind them goes to the shelf, what is not leaves it.

        Values have the shapes that the graph gives them.
        """
        made: dict[Node, Any] = {}
        right: dict[Node, Any] = {}

        def found(arg: Node) -> Any:
            if arg in self.fixed:
                return self.fixed[arg]
            if arg not in made:
                is_input = arg in self.operators.taken
                made[arg] = self.operators.input(arg, index) if is_input else self.shelf.get(arg, index)
            return made[arg]

        def true(arg: Node) -> Any:
            if arg not in right and arg in self.floats:
                right[arg] = self.floats.get(arg, index)
            return right[arg] if arg in right else found(arg)

        for node in nodes:
            made[node] = self.operators.call(node, loaded, found)
            if node in self.moved:
                right[node] = self.operators.call(node, plain, true)
            for arg in self.operators.read_last(node):
                made.pop(arg, None)
                right.pop(arg, None)
        for values, shelf in ((made, self.shelf), (right, self.floats)):
            for node in shelf:
                if self.last[node] < to:
                    shelf.release(node, index)
            for node in nodes:
                if node in values and self.last[node] >= to:
                    if self.numbers_only:
                        _refuse_not_a_number(node, values[node])
                    shelf.put(node, index, values[node])

    def _differs(self, node: Node) -> bool:
        """Whether an operator reads what the float model has otherwise: a replaced weight, or what comes of one."""
        replaced = {arg for arg in node.all_input_nodes if self.operators.weights.get(arg) in self.replaced}
        return bool(replaced) or not self.moved.isdisjoint(node.all_input_nodes)

    def _weights(self, nodes: Iterable[Node]) -> tuple[dict[Node, torch.Tensor], dict[Node, torch.Tensor]]:
        """What some operators read, by placeholder: as the walk has it, and as the float model does.

        Weights have their own shapes.
        """
        operators = self.operators
        loaded: dict[Node, torch.Tensor] = {}
        plain: dict[Node, torch.Tensor] = {}
        for arg in (arg for node in nodes for arg in node.all_input_nodes if arg in operators.weights):
            if arg in loaded:
                continue
            name = operators.weights[arg]
            found = self.changed.get(name)
            if found is None:
                loaded[arg] = plain[arg] = operators.program.weight(name)
                continue
            loaded[arg] = found() if callable(found) else found
            if self.reference:
                plain[arg] = operators.program.weight(name)
        return loaded, plain

    def _batches(self, node: Node, *, wanted: bool = False) -> Batches:
        def read(index: int) -> torch.Tensor:
            """What ``node`` answers in one batch, in the shape of the graph."""
            value: torch.Tensor
            if node in self.operators.taken:
                value = self.operators.input(node, index)
            elif node in self.fixed:
                value = self.fixed[node]
            else:
                value = (self.floats if wanted and node in self.floats else self.shelf).get(node, index)
            return value

        return Batches(self.count, read)

    def _answers(self, name: str, place: int) -> Answers:
        """`Layer.answers` of a weight that is met in front of operator number ``place``."""

        def answers(weight: torch.Tensor, numbers: Sequence[int]) -> list[list[torch.Tensor]]:
            """The float outputs of some batches, with ``weight`` (its own shape) in place of the layer's."""
            with_it: dict[str, torch.Tensor] = {}
            for other, changed in self.changed.items():
                with_it[other] = changed() if callable(changed) else changed
            with_it[name] = weight
            operators = self.operators
            if len(operators.readers(name)) > 1:
                return operators.answers(0, operators.inputs(numbers), with_it)
            here: Values = dict(operators.inputs(numbers))
            for node, value in self.fixed.items():
                here[node] = [value] * len(numbers)
            for node in self.shelf:
                here[node] = [self.shelf.get(node, number) for number in numbers]
            return operators.answers(place, here, with_it)

        return answers


def stops_of(operators: Operators) -> list[Stop]:
    """Where the weights are met, in the order of the graph."""
    import torch

    uses = {use.name: use for use in operators.program.record.inventory.weights}
    linear_layer = torch.ops.aten.linear.default
    answered = set(operators.taken)
    visited: set[str] = set()
    stops: list[Stop] = []
    linears: dict[Node, Stop] = {}
    for place, node in enumerate(operators.nodes):
        # What is read first, beside weights and constants, is the layer's input.
        source = next((item for item in node.all_input_nodes if item in answered), None)
        answered.add(node)
        for arg in node.all_input_nodes:
            name = operators.weights.get(arg)
            use = None if name is None else uses.get(name)
            if name is None or use is None or use.op == "other" or name in visited or source is None:
                continue
            # A table that is also the head (tied) is met where it multiplies, not where its rows are looked up.
            if use.op == "linear" and node.target != linear_layer:
                continue
            visited.add(name)
            alike = node.target == linear_layer
            stop = linears.get(source) if alike else None
            if stop is None:
                stop = Stop(place, source)
                stops.append(stop)
            if alike:
                linears[source] = stop
            stop.meetings.append(Meeting(node, arg, use))
    return stops


def reach(operators: Operators, stops: Sequence[Stop], answers: bool = False) -> tuple[dict[Node, int], set[Node]]:
    """For each node the place of the last operator that the walk reads it for; and the operators that it runs."""
    wanted = set(operators.outputs) if answers else set()
    wanted |= {stop.source for stop in stops}
    last: dict[Node, int] = dict.fromkeys(operators.taken, -1)
    needed: set[Node] = set()
    for place in range(len(operators.nodes) - 1, -1, -1):
        node = operators.nodes[place]
        last.setdefault(node, -1)
        if node not in wanted:
            continue
        needed.add(node)
        for arg in node.all_input_nodes:
            wanted.add(arg)
            last[arg] = max(last.get(arg, -1), place)
    for stop in stops:
        # Read during the visit, right in front of this place.
        last[stop.source] = max(last.get(stop.source, -1), stop.place)
    if answers:
        last.update(dict.fromkeys(operators.outputs, len(operators.nodes)))
    return last, needed


def _independent(operators: Operators, met: set[str]) -> set[Node]:
    """Operators that answer the same in every batch: neither the model's inputs nor a weight that is met reach them."""
    found: set[Node] = set()
    for node in operators.nodes:
        moving = False
        for arg in node.all_input_nodes:
            weight = operators.weights.get(arg)
            still = arg in found or arg in operators.constants or (weight is not None and weight not in met)
            moving = moving or not still
        if not moving:
            found.add(node)
    return found


def _apply(node: Node, args: Any, kwargs: Any) -> Any:
    import torch

    if node.target == torch.ops.aten.linear.default:
        return linear(*args, **kwargs)
    return cast("Any", node.target)(*args, **kwargs)


def _bias_of(node: Node, weight: Node) -> Node | None:
    """The third argument of a linear or convolution, when this operator alone reads it."""
    from torch.fx import Node

    bias = node.args[2] if len(node.args) > 2 else None
    own = isinstance(bias, Node) and len(bias.users) == 1 and node.args[1] is weight
    return cast("Node", bias) if own else None


def _refuse_not_a_number(node: Node, value: Any) -> None:
    import torch

    # A sum is NaN where a number is, or where infinities of both signs are.
    suspect = isinstance(value, torch.Tensor) and value.is_floating_point() and bool(torch.isnan(value.sum()))
    if suspect and bool(torch.isnan(value).any()):
        raise DataError(f"calibration makes NaN at {node.name}", fix="check the calibration data for outliers")
