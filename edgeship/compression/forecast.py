"""What walking a program with calibration data will take, before it is done: seconds and bytes, layer by layer.

Seconds are products counted from the graph's shapes, at the speed that this machine shows in a moment's trial, and
rounding counted in weights. Memory is what the walk holds, what the largest layer needs, and what the process has now.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeship.compression.held import HELD_BYTES
from edgeship.compression.nearest_plane import ROW_RANGES
from edgeship.compression.products import product
from edgeship.compression.walk import Operators, reach, stops_of
from edgeship.core.weights import Affine, Float

if TYPE_CHECKING:
    from torch.fx import Node

    from edgeship.core.weights import Encoding
    from edgeship.program.program import TorchProgram

# Side of the matrices, and how many products are timed: some 50 ms.
TRIAL_SIDE, TRIALS = 768, 7
# Between products: norms, rotations, activations and what is read and written of them, as a share of their time.
AROUND = 0.45
# Rounding against data beyond its products, in multiplications a weight: of groups the ranges that are tried.
ROUNDING = {"group": 1.2e4, "channel": 6e3, "tensor": 6e3}
# What a multiplication takes in solving triangles, over one in products.
SOLVING = 2.0
# Copies of the part of a layer that is rounded at once, and of matrices of its input channels.
COPIES, MATRICES = 10, 3


@dataclass(frozen=True)
class Forecast:
    """What a walk will take.

    Args:
        rounding: seconds of each weight, in the order that they are met, whatever the number of batches.
        running: seconds of each weight for one batch: reaching it, and what is gathered there.
        held: bytes of one batch that wait between layers. layer: bytes of the largest layer. now: of the process.
    """

    rounding: tuple[float, ...]
    running: tuple[float, ...]
    held: int
    layer: int
    now: int

    def seconds(self, batches: int) -> float:
        """Of the whole walk."""
        return sum(self.rounding) + batches * sum(self.running)

    def shares(self, batches: int) -> list[float]:
        """How much of the whole is done when each weight is met, from 0 to 1."""
        costs = [once + batches * each for once, each in zip(self.rounding, self.running, strict=True)]
        total, before, found = sum(costs) or 1.0, 0.0, []
        for once, each in zip(self.rounding, self.running, strict=True):
            # A weight is met when its inputs are there.
            found.append((before + batches * each) / total)
            before += once + batches * each
        return found

    def memory_bytes(self, batches: int) -> int:
        """The most that the process will hold."""
        return self.now + min(self.held * batches, HELD_BYTES) + self.layer

    def batches_within(self, seconds: float) -> int:
        """How many batches fit into a time; 0 when rounding alone does not."""
        each = sum(self.running)
        left = seconds - sum(self.rounding)
        return max(0, int(left / each)) if each > 0 else 1 << 30


class Progress:
    """Progress of a walk in time: what is done and what is left, corrected by how long it took so far.

    Args:
        ahead: the forecast. batches: how many are walked. tell: ``tell(done, total, what)`` as passes have it.
    """

    def __init__(self, ahead: Forecast, batches: int, tell: Callable[[int, int, str], None]) -> None:
        self.expected = ahead.seconds(batches)
        self._shares = ahead.shares(batches)
        self._tell = tell
        self._begin = time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Tell how far the walk is, and how long the rest takes."""
        share = self._shares[done] if total == len(self._shares) and done < total else 1.0
        if share >= 1.0:
            self._tell(done, total, what)
            return
        gone = time.monotonic() - self._begin
        # What the pace so far says of the rest, and what the forecast does: the more is done, the more the pace counts.
        left = (1 - share) * (gone + (1 - share) * self.expected)
        self._tell(done, total, f"{what}, {human_seconds(left)} left")


def forecast(
    program: TorchProgram,
    batches: Sequence[Mapping[str, Any]],
    wanted: Mapping[str, Encoding],
    method: str,
    rate: float | None = None,
) -> Forecast:
    """What encoding a program's weights against data takes.

    Args:
        batches: one is enough: only shapes are read. wanted: weight name -> encoding.
        rate: multiplications a second in products; measured when None.
    """
    operators = Operators(program, batches[:1])
    stops = stops_of(operators)
    last, needed = reach(operators, stops)
    rate = rate or product_rate()
    beside = method == "gptq"
    rounding: list[float] = []
    running: list[float] = []
    held = layer = at = 0
    for stop in stops:
        nodes = [node for node in operators.nodes[at : stop.place] if node in needed]
        reaching = sum(_multiplications(node) for node in nodes) * (1 + beside)
        at = stop.place
        waiting = [node for node in operators.nodes[:at] if node in needed and last[node] >= at]
        held = max(held, sum(_bytes(node) for node in waiting) * (1 + beside))
        for number, meeting in enumerate(stop.meetings):
            encoding = wanted.get(meeting.use.name)
            looks = encoding is not None and not isinstance(encoding, Float) and method in ("gptq", "awq")
            channels, rows, groups = _sizes(meeting.use.op, meeting.use.shape, meeting.use.groups)
            gathered = alone = 0.0
            if looks and channels:
                lines = _lines(meeting.node)
                square = groups * channels * channels
                # Half of ``X X^T``, and all of what drifted.
                gathered = lines * square * (0.5 + beside) if number == 0 else 0.0
                alone = _alone(encoding, rows, channels, groups, beside)
                copied = COPIES * 4 * min(rows * channels, max(1 << 21, 1024 * channels))
                layer = max(layer, 4 * square * (MATRICES + beside) + copied + 4 * 2 * meeting.use.elements)
            running.append(((reaching if number == 0 else 0.0) + gathered) * (1 + AROUND) / rate)
            rounding.append(alone / rate)
    return Forecast(tuple(rounding), tuple(running), held, layer, _resident())


def product_rate() -> float:
    """Multiplications a second in products of float32, as they run right now."""
    import torch

    left = torch.ones(TRIAL_SIDE, TRIAL_SIDE)
    times = []
    for _ in range(TRIALS):
        begin = time.perf_counter()
        product(left, left)
        times.append(time.perf_counter() - begin)
    return TRIAL_SIDE**3 / sorted(times)[TRIALS // 2]


def human_seconds(seconds: float) -> str:
    """``45 s``, ``3 min``, ``1.5 h``."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _sizes(op: str, shape: tuple[int, ...], groups: int) -> tuple[int, int, int]:
    """Input channels that one output sees, rows of a group, groups; none for what is not rounded against data."""
    if op not in ("linear", "conv", "depthwise_conv"):
        return 0, 0, 1
    channels = 1
    for size in shape[1:]:
        channels *= size
    return channels, shape[0] // groups, groups


def _alone(encoding: Encoding | None, rows: int, channels: int, groups: int, beside: bool) -> float:
    """Multiplications of rounding one weight, by what they would take in products."""
    reach = encoding.granularity if isinstance(encoding, Affine) else "channel"
    searched = isinstance(encoding, Affine) and reach == "channel" and encoding.bits < 8
    square = channels * channels
    # A row meets a triangle for each range that is tried whole, and with the drift a square and two triangles; the
    # factor is a third of a cube. These run in LAPACK's kernels.
    solved = rows * square * (0.5 * (ROW_RANGES if searched else 1) + 2 * beside) + square * channels / 3
    return groups * (SOLVING * solved + rows * channels * ROUNDING[reach])


def _lines(node: Node) -> float:
    """Rows that a layer's weight meets in one batch: tokens, or positions of a convolution."""
    shape = node.meta["val"].shape
    outputs = 1
    for size in shape:
        outputs *= int(size)
    axis = -1 if len(shape) < 3 or "linear" in str(node.target) else 1
    return outputs / int(shape[axis])


def _multiplications(node: Node) -> float:
    """Of one operator in one batch; 0 for what is not mostly products."""
    import torch

    aten = torch.ops.aten
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0.0
    inputs = [arg.meta["val"] for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), torch.Tensor)]
    if node.target == aten.linear.default or "conv" in str(node.target):
        weight = inputs[1] if len(inputs) > 1 else value
        return float(value.numel()) * weight.numel() / max(1, int(weight.shape[0]))
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default) and inputs:
        return float(value.numel()) * int(inputs[0].shape[-1])
    if "attention" in str(node.target) and len(inputs) > 1:
        return 2.0 * float(inputs[0].numel()) * int(inputs[1].shape[-2])
    return 0.0


def _bytes(node: Node) -> int:
    import torch

    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def _resident() -> int:
    """Bytes of memory that this process has now."""
    import psutil

    return int(psutil.Process().memory_info().rss)
