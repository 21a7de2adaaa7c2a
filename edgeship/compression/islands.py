"""Which activations of a static program stay in float, because one grid cannot hold what they hold.

Two facts decide, both taken on the calibration data and never on names. A join that reaches an output keeps a grid only
while that grid leaves every part of it, in every sample, a ratio above the limit: boxes of 0 to 640 beside scores of 0
to 1 do not. And where the outputs, slice by slice (`program.slices`) and sample by sample, lose more than the limit to
all grids together, each is tried alone, and those that cost most go until the rest costs less: noise of grids adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeship.compression.calibrate import HEADROOM, Runner, decide_activations, written_constants
from edgeship.compression.grids import JOINING, activation_nodes, carriers, keeps_grid, operator_name, shared_grids
from edgeship.compression.observers import Observer
from edgeship.program.slices import NOTHING, Slice, slices_of

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch.fx import Node

    from edgeship.core.weights import ActivationEncoding
    from edgeship.program.program import TorchProgram

    Array = npt.NDArray[Any]
    Batch = Mapping[str, npt.NDArray[Any]]

# What the grids must leave of every slice, by their bits: check/verify's limit and room for what the weights cost.
WANTED_DB = {8: 21.0, 16: 33.0}
# Of it, what is that room.
ROOM_DB = 3.0
# Samples that grids are tried on, and multiply-accumulates that trying each alone may take.
SAMPLES = 16
BUDGET = 4e12
ROUNDS = 4
# How far beyond what samples give a grid may reach for probes; the largest that costs the samples too little to matter.
REACHES = (64.0, 16.0, 4.0, 1.0)


@dataclass(frozen=True)
class Mixed:
    """What was decided.

    Args:
        activations: node -> grid. floats: nodes without one, for their join or for what they cost.
        worst_db: the least that any slice of an output keeps in any sample. worst: which slice of which output.
    """

    activations: dict[str, ActivationEncoding]
    floats: tuple[str, ...]
    worst_db: float
    worst: str


def decide_mixed(
    program: TorchProgram,
    batches: Sequence[Batch],
    *,
    bits: int,
    method: str,
    products: bool = True,
    probes: Sequence[Batch] = (),
    progress: Any = None,
) -> Mixed:
    """Grids for every activation that can have one, on the samples given.

    Args:
        program: in its static form. bits, method: as in `decide_activations`.
        products: whether an operator with stored integer weights can compute in float beside static ones.
        probes: as in `decide_activations`; ranges reach for them as far as the samples themselves allow.

    Raises:
        DataError: as `decide_activations`.
    """
    kept = frozenset() if products else _around_products(program)
    floats = separate_joins(program, batches, bits) - kept
    trial = _Trial(program, batches, bits)
    # As far beyond the samples as costs them too little to matter.
    for reach in REACHES if probes else (1.0,):
        activations = decide_activations(
            program, batches, bits=bits, method=method, floats=floats, probes=probes, reach=reach, progress=progress
        )
        worst_db, worst = trial.worst(activations)
        if worst_db >= WANTED_DB[bits]:
            break
    wanted = WANTED_DB[bits]
    for _ in range(ROUNDS):
        if worst_db >= WANTED_DB[bits]:
            break
        costly = trial.costly(activations, shared_grids(program.filled(), floats), kept, wanted)
        if not costly:
            break
        floats = floats | costly
        activations = {name: grid for name, grid in activations.items() if name not in floats}
        worst_db, worst = trial.worst(activations)
        wanted += 2
    # In graph order, so that the same program gives the same record.
    order = [node.name for node in program.exported.graph.nodes if node.name in floats]
    return Mixed(activations, tuple(order), worst_db, worst)


def separate_joins(program: TorchProgram, batches: Sequence[Batch], bits: int) -> frozenset[str]:
    """Joins on the way to an output whose parts one grid of ``bits`` cannot hold, and what only moves their numbers."""
    filled = program.filled()
    nodes = {node.name: node for node in activation_nodes(filled)}
    joins = [node for node in nodes.values() if operator_name(node) in JOINING and _reaches_output(node)]
    if not joins:
        return frozenset()
    parts = {arg.name for node in joins for arg in carriers(node)}
    extents = {name: _Extent() for name in parts}
    runner = Runner(filled, {}, {})
    for batch in batches:
        runner.run([batch[spec.name] for spec in program.signature.inputs], extents, _look)
    constants = written_constants(filled.graph)
    floats: set[str] = set()
    for node in filled.graph.nodes:
        if node.name not in nodes:
            continue
        mine = carriers(node)
        if node in joins:
            found = [extents[arg.name] for arg in mine]
            if any(arg.name in floats for arg in mine) or _apart(found, constants.get(node.name, ()), bits):
                floats.add(node.name)
        elif keeps_grid(node) and mine and mine[0].name in floats:
            floats.add(node.name)
    return frozenset(floats)


class _Extent(Observer):
    """Extremes of one activation, and the mean square of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.squares: list[float] = []


def _look(extent: Observer, value: torch.Tensor) -> None:
    """Any shape: one activation of one sample."""
    assert isinstance(extent, _Extent)
    extent.widen(value)
    extent.squares.append(float(value.double().square().mean()))


def _apart(parts: Sequence[_Extent], constants: Sequence[float], bits: int) -> bool:
    """Whether one grid over all parts leaves less than is wanted of one of them in one sample."""
    # One grid would have to reach from the least to the greatest of all parts.
    low = min([part.low for part in parts] + list(constants))
    high = max([part.high for part in parts] + list(constants))
    step = (high - low) / 255 if bits == 8 else HEADROOM * max(-low, high) / 32767
    # The mean square of what rounding to steps adds, where it is uniform.
    noise = step**2 / 12
    least = noise * 10 ** (WANTED_DB[bits] / 10)
    return any(0 < square < least for part in parts for square in part.squares)


def _reaches_output(node: Node) -> bool:
    """Whether an output is this value, moved and joined with others perhaps."""
    return any(
        user.op == "output" or ((keeps_grid(user) or operator_name(user) in JOINING) and _reaches_output(user))
        for user in node.users
    )


def _around_products(program: TorchProgram) -> frozenset[str]:
    """What operators with integer weights read and answer, and what shares its grid."""
    exported = program.exported
    names = {**exported.graph_signature.inputs_to_parameters, **exported.graph_signature.inputs_to_buffers}
    aliases = program.record.aliases
    stored = {node for node, name in names.items() if aliases.get(name, name) in program.encoded}
    around: set[str] = set()
    for node in exported.graph.nodes:
        if any(arg.name in stored for arg in node.all_input_nodes):
            around.update(arg.name for arg in (node, *node.all_input_nodes))
    return frozenset(around)


def _costliest_first(alone: Sequence[Array], total: Array) -> list[int]:
    """Which of the grids to leave out, until what is left of ``total`` [counted] is at most 1 everywhere."""
    import numpy as np

    gone: list[int] = []
    while (total > 1).any() and len(gone) < len(alone):
        failing = total > 1
        gains = np.array([float(item[failing].sum()) for item in alone])
        gains[gone] = -1.0
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            break
        gone.append(best)
        total = total - alone[best]
    return gone


class _Trial:
    """The program's float outputs on some samples, to compare with what grids make of them."""

    def __init__(self, program: TorchProgram, batches: Sequence[Batch], bits: int) -> None:
        import numpy as np

        self._program, self._bits = program, bits
        # The inputs of each sample, in the order of the signature.
        self._inputs: list[list[Array]] = []
        count = min(SAMPLES, len(batches))
        for index in range(count):
            batch = batches[index * len(batches) // count]
            self._inputs.append([batch[spec.name] for spec in program.signature.inputs])
        self._runner = Runner(program.filled(), {}, {})
        self._names = [spec.name for spec in program.signature.outputs]
        # Of each float output: its place among the outputs, its values [samples, *shape], and their slices.
        self._places: list[int] = []
        self._wanted: list[Array] = []
        self._slices: list[list[Slice]] = []
        for place, value in enumerate(self._answers({}, range(count))):
            if np.issubdtype(value.dtype, np.floating):
                wanted = value.astype(np.float64)
                self._places.append(place)
                self._wanted.append(wanted)
                self._slices.append(slices_of(wanted))

    def worst(self, activations: Mapping[str, ActivationEncoding]) -> tuple[float, str]:
        """The least ratio of a slice in a sample, and the slice."""
        import numpy as np

        count = len(self._inputs)
        noise = self._noise(activations, range(count))
        worst, where = 200.0, ""
        for index, (place, part) in enumerate(self._parts()):
            signal = self._signal(place, part, range(count))
            counted = signal > 0
            if not counted.any():
                continue
            ratios = 10 * np.log10(signal[counted] / np.maximum(noise[index][counted], 1e-20 * signal[counted]))
            if float(ratios.min()) < worst:
                worst, where = float(ratios.min()), f"{self._names[self._places[place]]} ({part})"
        return worst, where

    def costly(
        self, activations: Mapping[str, ActivationEncoding], grids: Sequence[Any], kept: frozenset[str], wanted: float
    ) -> frozenset[str]:
        """Nodes of the grids to leave out so that the rest costs every slice less than is wanted."""
        import numpy as np

        free: list[tuple[str, ...]] = []
        for grid in grids:
            if grid.nodes[0] in activations and not kept.intersection(grid.nodes):
                free.append(grid.nodes)
        macs = max(self._program.record.inventory.macs, 1)
        count = min(len(self._inputs), int(BUDGET / (macs * max(len(free), 1))))
        if not free or count == 0:
            return frozenset()
        numbers = [index * len(self._inputs) // count for index in range(count)]
        # [slices x samples], of which those are counted that say something.
        signal = np.concatenate([self._signal(place, part, numbers) for place, part in self._parts()])
        counted = signal > 0
        allowed = signal[counted] * 10 ** (-wanted / 10)

        def cost(chosen: Mapping[str, ActivationEncoding]) -> Array:
            """Noise over what is allowed, [counted]: above 1 fails."""
            return np.concatenate(self._noise(chosen, numbers))[counted] / allowed

        alone: list[Array] = []
        rest = dict(activations)
        for nodes in free:
            alone.append(cost({name: activations[name] for name in nodes}))
            for name in nodes:
                rest.pop(name, None)
        total = np.sum(alone, axis=0)
        if rest:
            total = total + cost(rest)
        floats: set[str] = set()
        for index in _costliest_first(alone, total):
            floats.update(free[index])
        return frozenset(floats)

    def _parts(self) -> list[tuple[int, Slice]]:
        """Every slice of every float output, with the number of its output among the float ones."""
        return [(place, part) for place, parts in enumerate(self._slices) for part in parts]

    def _signal(self, place: int, part: Slice, numbers: Sequence[int]) -> Array:
        """The energy of a slice in each sample; 0 where it says nothing beside other samples."""
        import numpy as np

        # [samples, numbers of the slice] -> [samples]
        energy = np.square(part.of(self._wanted[place])).sum(1)
        energy[energy < NOTHING * energy.max(initial=0)] = 0
        return np.asarray(energy[list(numbers)])

    def _noise(self, activations: Mapping[str, ActivationEncoding], numbers: Sequence[int]) -> list[Array]:
        """The energy of the error of each slice, one row a slice, one number a sample."""
        import numpy as np

        found = self._answers(activations, numbers)
        errors: list[Array] = []
        for index, place in enumerate(self._places):
            errors.append(found[place].astype(np.float64) - self._wanted[index][list(numbers)])
        return [np.square(part.of(errors[place])).sum(1) for place, part in self._parts()]

    def _answers(self, activations: Mapping[str, ActivationEncoding], numbers: Sequence[int]) -> list[Array]:
        """Each output of the samples of these numbers, [samples, *shape]."""
        import numpy as np

        rows = [self._runner.answers(self._inputs[number], activations) for number in numbers]
        return [np.stack(column) for column in zip(*rows, strict=True)]
