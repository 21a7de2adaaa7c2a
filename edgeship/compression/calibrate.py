"""Static activation grids from calibration data: run the float program, watch its activations, choose their ranges.

Two sweeps over the data (extremes, then histograms of fixed size); memory does not grow with the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeship.compression.grids import SAME_AS_INPUT, Grid, activation_arguments, operator_name, shared_grids
from edgeship.compression.observers import METHODS, Observer, choose_range
from edgeship.core.model import Signature
from edgeship.core.weights import ActivationEncoding, AffineTensor
from edgeship.errors import DataError, UsageError
from edgeship.program.rewrites import MASKED

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch.fx import Node

    from edgeship.program.program import TorchProgram

    Batch = Mapping[str, npt.NDArray[Any]]

# Below this a float16 scale is subnormal, and the runtimes do not agree on those.
MIN_SCALE = 2.0**-14
MAX_SCALE = 65504.0
# Significant bits of float16; 16-bit grids need finer scales than float16's exponents reach, and are stored in float32.
SIGNIFICANT_BITS = 11
# Sixteen bits have room: half as much again beyond what was seen costs 0.6 of a bit, where a clipped value costs all.
HEADROOM = 1.5
# The least part of its range that a grid keeps so as to end within a clip: a step and a half of 128 go.
CLIP_SHARE = 1 - 1.5 / 128
# What lies further below the largest of its row adds nothing to a softmax; grids in 16 bits need not reach it.
REACH = 20.0


def decide_activations(
    program: TorchProgram,
    batches: Sequence[Batch],
    *,
    bits: int = 8,
    method: str = "mse",
    floats: Collection[str] = (),
    probes: Sequence[Batch] = (),
    reach: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, ActivationEncoding]:
    """A static grid for every float activation, by node name.

    Args:
        program: the float program, weights as they will be stored.
        batches: model inputs by name, in the shapes and dtypes of the signature.
        bits: 8 (asymmetric) or 16 (symmetric, zero point 0).
        method: how ranges are chosen, see `observers`; ``minmax`` is the one for 16 bits, where outliers cost nothing.
        floats: nodes that get none, and compute in float.
        probes: inputs that may come though ``batches`` hold none like them; ranges are widened for what they give, to
            ``reach`` times what ``batches`` give at most. One that the model cannot answer is left out.
        progress: called with (runs done, runs in all).

    Raises:
        DataError: no data, a wrong name, shape or dtype, NaN or infinity in the data or made from it.
        UsageError: an unknown method or number of bits.
    """
    if bits not in (8, 16):
        raise UsageError(f"activations in {bits} bits are not known", fix="use 8 or 16")
    if method not in METHODS:
        raise UsageError(f"calibration method {method!r} is not known", fix=f"use one of {', '.join(METHODS)}")
    # Before anything is run: a wrong sample would only fail far from its cause.
    check_batches(program.signature, batches)
    filled = program.filled()
    grids = shared_grids(filled, floats)
    known = {name: encoding for grid in grids if (encoding := _known(grid, program, bits)) for name in grid.nodes}
    watchers: dict[str, Observer] = {}
    for grid in grids:
        if grid.nodes[0] not in known:
            observer = Observer()
            watchers.update(dict.fromkeys(grid.watched, observer))
    scores, through = _scores(filled.graph) if bits == 16 else ({}, set())
    watchers = {name: observer for name, observer in watchers.items() if name not in through}
    runner = Runner(filled, written_constants(filled.graph), scores)
    sweeps: list[Callable[[Observer, torch.Tensor], None]] = [Observer.widen]
    if method != "minmax":
        sweeps.append(Observer.count)
    done = 0
    for sweep in sweeps:
        for batch in batches:
            runner.run([batch[spec.name] for spec in program.signature.inputs], watchers, sweep)
            done += 1
            if progress:
                progress(done, len(sweeps) * len(batches))
    if probes:
        _widen(runner, program.signature, watchers, probes, reach)
    decided = dict(known)
    tables = _tables(filled, runner) if bits == 16 else {}
    nodes = {node.name: node for node in filled.graph.nodes}
    for grid in grids:
        if grid.nodes[0] not in known:
            # Nodes of one grid share their observer, so that any of them will do.
            seen = next(watchers[name] for name in grid.watched if name in watchers)
            low, high = choose_range(seen, method, 2**bits, symmetric=bits == 16)
            if low == high == 0:
                low, high = _range_of_operands([nodes[name] for name in grid.nodes], decided)
            if bits == 16:
                # Whole tables, because other rows than the data's are read later.
                ends = [(HEADROOM * low, HEADROOM * high), *(tables[name] for name in grid.nodes if name in tables)]
                low, high = min(low for low, _ in ends), max(high for _, high in ends)
            decided.update(dict.fromkeys(grid.nodes, encode_range(low, high, bits, grid.clip)))
    return {node.name: decided[node.name] for node in filled.graph.nodes if node.name in decided}


def _widen(
    runner: Runner, signature: Signature, watchers: Mapping[str, Observer], probes: Sequence[Batch], reach: float
) -> None:
    """Let observers take in what probes give, as far as ``reach`` allows."""
    # What probes give is held apart, because it counts only as far as `reach` allows.
    beyond = {id(observer): Observer() for observer in watchers.values()}
    for probe in probes:
        seen = {id(observer): Observer() for observer in watchers.values()}
        try:
            inputs = [probe[spec.name] for spec in signature.inputs]
            runner.run(inputs, {name: seen[id(observer)] for name, observer in watchers.items()}, Observer.widen)
        except DataError:
            continue
        for key, observer in seen.items():
            beyond[key].low, beyond[key].high = min(beyond[key].low, observer.low), max(beyond[key].high, observer.high)
    for observer in {id(item): item for item in watchers.values()}.values():
        # As seen from zero, in both directions.
        far = reach * max(-observer.low, observer.high)
        observer.low = min(observer.low, max(beyond[id(observer)].low, -far))
        observer.high = max(observer.high, min(beyond[id(observer)].high, far))


def check_batches(signature: Signature, batches: Sequence[Batch]) -> None:
    """Raise `DataError` unless every batch has the signature's inputs, shapes and dtypes, with finite values."""
    import numpy as np

    if not batches:
        raise DataError("the calibration set is empty", fix="give at least one sample")
    names = [spec.name for spec in signature.inputs]
    for index, batch in enumerate(batches):
        if sorted(batch) != sorted(names):
            raise DataError(
                f"calibration sample {index} has {', '.join(sorted(batch)) or 'nothing'}",
                fix=f"give {', '.join(names)}",
            )
        for spec in signature.inputs:
            value = np.asarray(batch[spec.name])
            if tuple(value.shape) != spec.shape or str(value.dtype) != spec.numpy_dtype:
                found = f"{value.dtype}{list(value.shape)}"
                raise DataError(
                    f"calibration sample {index}: {spec.name} is {found}, the model takes {spec}",
                    fix="convert the data first",
                )
            if np.issubdtype(value.dtype, np.floating) and not bool(np.isfinite(value).all()):
                raise DataError(
                    f"calibration sample {index}: {spec.name} holds NaN or infinity", fix="remove that sample"
                )


def encode_range(
    low: float, high: float, bits: int, clip: tuple[float, float] = (-math.inf, math.inf)
) -> ActivationEncoding:
    """The grid that covers ``low..high`` (zero included): int8 asymmetric, or int16 symmetric with zero point 0.

    The scale is rounded up to float16's 11 significant bits, so that float16 and float32 files hold the same number
    and the ends stay inside.

    Args:
        clip: what a ReLU or clamp on this grid lets through. Where the range ends at the clip, the grid of 8 bits ends
            within it (the scale is rounded down): no integer is then clipped, and the runtime may leave the clip out.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    # The integers between the ends of the range.
    steps = 255 if bits == 8 else 32767
    span = high - low if bits == 8 else max(-low, high)
    if span == 0:
        # Not 1: Hexagon's sums wrap around where an operand's scale is 2**14 times the sum's.
        return ActivationEncoding(bits, MIN_SCALE if bits == 8 else MIN_SCALE / 2**16, 0)
    scale = _round_up(span / steps)
    if bits == 16:
        return ActivationEncoding(16, scale, 0)
    scale = min(max(scale, MIN_SCALE), MAX_SCALE)
    covering = _on_zero(low, scale)
    return covering if low < clip[0] or high > clip[1] else _inside(covering, low, clip)


def _on_zero(low: float, scale: float) -> ActivationEncoding:
    return ActivationEncoding(8, scale, max(-128, min(127, round(-128 - low / scale))))


def _inside(grid: ActivationEncoding, low: float, clip: tuple[float, float]) -> ActivationEncoding:
    """The next smaller grid whose ends a clip lets through; ``grid`` when it is that already, or would lose more than
    a step or so of its range."""
    wanted = grid
    for _ in range(8):
        below, above = (grid.low - grid.zero_point), (grid.high - grid.zero_point)
        limits = [end / steps for end, steps in zip(clip, (below, above), strict=True) if steps and math.isfinite(end)]
        scale = min(limits, default=math.inf)
        if scale >= grid.scale:
            return grid
        if scale < max(MIN_SCALE, CLIP_SHARE * wanted.scale):
            break
        grid = _on_zero(low, _rounded(scale, math.floor))
    return wanted


def _round_up(value: float) -> float:
    return _rounded(value, math.ceil)


def _rounded(value: float, way: Callable[[float], int]) -> float:
    """To float16's significant bits."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(way(mantissa * 2**SIGNIFICANT_BITS), exponent - SIGNIFICANT_BITS)


def _known(grid: Grid, program: TorchProgram, bits: int) -> ActivationEncoding | None:
    """The grid of fixed ranges and of rows looked up in an int8 table; None when data must decide."""
    if grid.fixed == "unit":
        return ActivationEncoding(8, 1 / 256, -128) if bits == 8 else ActivationEncoding(16, 1 / 32768, 0)
    if grid.fixed == "signed":
        return ActivationEncoding(8, 1 / 128, 0) if bits == 8 else ActivationEncoding(16, 1 / 32768, 0)
    table = _table_scale(grid, program)
    if table is None:
        return None
    # On the table's own grid (or 256 steps of a finer one) the looked-up integers pass unchanged.
    return ActivationEncoding(8, table, 0) if bits == 8 else ActivationEncoding(16, table / 256, 0)


def _tables(program: Any, runner: Runner) -> dict[str, tuple[float, float]]:
    """The ends of whole tables by the node that looks rows up in them: other rows than the data's are read later."""
    found = {}
    for node in program.graph.nodes:
        if operator_name(node) != "embedding":
            continue
        table = runner.weights.get(str(node.args[0]))
        if table is not None:
            found[node.name] = (float(table.min()), float(table.max()))
    return found


def _range_of_operands(nodes: Sequence[Node], decided: Mapping[str, ActivationEncoding]) -> tuple[float, float]:
    """A range for what was zero whenever data passed, such as the part of an expert that no token took: the widest of
    what it is made from. Nothing for constants."""
    lowest: list[float] = []
    highest: list[float] = []
    for node in nodes:
        operands = activation_arguments(node) if node.op == "call_function" else []
        for operand in operands:
            grid = decided.get(operand.name)
            if grid is not None:
                lowest.append((grid.low - grid.zero_point) * grid.scale)
                highest.append((grid.high - grid.zero_point) * grid.scale)
    return min(lowest, default=0.0), max(highest, default=0.0)


def _table_scale(grid: Grid, program: TorchProgram) -> float | None:
    """The scale of a per-tensor symmetric int8 table, when the grid holds one lookup and views of it."""
    nodes = {node.name: node for node in program.exported.graph.nodes}
    members: list[Node] = [nodes[name] for name in grid.nodes]
    if operator_name(members[0]) != "embedding" or grid.watched != grid.nodes:
        return None
    if any(operator_name(node) == "embedding" or len(node.all_input_nodes) != 1 for node in members[1:]):
        return None
    signature = program.exported.graph_signature
    name = signature.inputs_to_parameters.get(str(members[0].args[0]), "")
    tensor = program.encoded.get(program.record.aliases.get(name, name))
    if not isinstance(tensor, AffineTensor) or tensor.scale.size != 1 or not tensor.encoding.symmetric:
        return None
    return float(tensor.scale.reshape(())) if tensor.encoding.bits == 8 else None


class Runner:
    """Runs an exported graph node by node, showing watched values to their observers.

    Args:
        constants: numbers that nodes may hold beside what they hold here. scores: what softmax reads -> its axis.
    """

    def __init__(self, program: Any, constants: Mapping[str, list[float]], scores: Mapping[str, int]) -> None:
        self._program = program
        self._constants, self._scores = constants, scores
        signature = program.graph_signature
        self.weights: dict[str, Any] = {}
        for node, name in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items():
            value = program.state_dict.get(name)
            self.weights[node] = program.constants[name] if value is None else value

    def run(
        self,
        inputs: Sequence[npt.NDArray[Any]],
        watchers: Mapping[str, Observer],
        sweep: Callable[[Observer, torch.Tensor], None],
    ) -> None:
        """Run once. Raises `DataError` when a watched value is not finite.

        Inputs have the shapes of the signature, in its order.
        """
        import torch

        constants, scores = self._constants, self._scores

        class Watching(torch.fx.Interpreter):
            def run_node(self, n: Node) -> Any:
                value = super().run_node(n)
                observer = watchers.get(n.name)
                if observer is not None:
                    if not bool(torch.isfinite(value).all()):
                        raise DataError(
                            f"activation {n.name} is not finite on the calibration data",
                            fix="check the data and the weights; masks must be finite",
                        )
                    least = value.amax(scores[n.name], keepdim=True) - REACH if n.name in scores else None
                    sweep(observer, value if least is None else value.maximum(least))
                    if n.name in constants:
                        numbers = torch.tensor(constants[n.name])
                        sweep(observer, numbers if least is None else numbers.maximum(least.min()))
                return value

        with torch.no_grad():
            Watching(self._program.graph_module).run(*self._arguments(inputs))

    def answers(
        self, inputs: Sequence[npt.NDArray[Any]], activations: Mapping[str, ActivationEncoding]
    ) -> list[npt.NDArray[Any]]:
        """The outputs when the named values are rounded to their grids and the others stay float.

        Each array has the shape that the signature says.
        """
        import torch

        class Rounding(torch.fx.Interpreter):
            def run_node(self, n: Node) -> Any:
                value = super().run_node(n)
                grid = activations.get(n.name)
                if grid is None:
                    return value
                return torch.fake_quantize_per_tensor_affine(value, grid.scale, grid.zero_point, grid.low, grid.high)

        with torch.no_grad():
            found = Rounding(self._program.graph_module).run(*self._arguments(inputs))
        return [value.numpy() for value in found]

    def _arguments(self, inputs: Sequence[npt.NDArray[Any]]) -> list[torch.Tensor]:
        """The graph's placeholders in order: weights by name, and the inputs, each in its own shape."""
        import numpy as np
        import torch

        values = iter(torch.from_numpy(np.asarray(array, order="C")) for array in inputs)
        return [
            self.weights[node.name] if node.name in self.weights else next(values)
            for node in self._program.graph.nodes
            if node.op == "placeholder"
        ]


def written_constants(graph: Any) -> dict[str, list[float]]:
    """Numbers that selects, pads and masks may write, by node, whether the data shows them or not.

    They pass through shape operators, and through the addition before a softmax: calibration data without padding must
    not give scores a grid on which a mask cannot be told from a low score.
    """
    written: dict[str, list[float]] = {}
    for node in graph.nodes:
        name = operator_name(node)
        scalars = [float(arg) for arg in node.args if isinstance(arg, (int, float)) and not isinstance(arg, bool)]
        passed = [number for arg in node.all_input_nodes for number in written.get(arg.name, ())]
        if name in ("where", "masked_fill", "pad", "constant_pad_nd"):
            written[node.name] = [*scalars, *passed]
        elif name == "mul" and scalars and scalars[0] in MASKED.values():
            written[node.name] = scalars
        elif passed and (name in SAME_AS_INPUT or (name == "add" and _feeds_softmax(node))):
            written[node.name] = passed
    return {name: numbers for name, numbers in written.items() if numbers}


def _scores(graph: Any) -> tuple[dict[str, int], set[str]]:
    """What softmax reads and nothing else does, with the axis it runs along; and what only passes through to there."""
    scores: dict[str, int] = {}
    through: set[str] = set()
    for user in graph.nodes:
        if operator_name(user) not in ("softmax", "_softmax"):
            continue
        node = user.args[0]
        if len(node.users) > 1:
            continue
        scores[node.name] = int(user.args[1])
        while operator_name(node) in SAME_AS_INPUT and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
            if len(node.users) > 1 or node.op != "call_function":
                break
            through.add(node.name)
    return scores, through


def _feeds_softmax(node: Node) -> bool:
    """Whether softmax reads it, or a view of it."""
    names = ((operator_name(user), user) for user in node.users)
    return any(
        name in ("softmax", "_softmax") or (name in SAME_AS_INPUT and _feeds_softmax(user)) for name, user in names
    )
