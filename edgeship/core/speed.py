"""Which arithmetic is quickest for a model, from measured times of layers.

The times lie in `layer_times.json`, which ``python benchmarks/layer_times.py`` writes: for a runtime, a kind of layer
and an arithmetic the nanoseconds that a layer takes whatever its size, those of a thousand of its multiply-accumulates,
and those of a thousand numbers that it reads and writes. A build reads them and measures nothing: on a machine with
other work it would decide by chance, and the same order would give two artifacts (docs/decisions/0021).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeship.core.forms import ActivationMode
from edgeship.core.inventory import Inventory, OpCost, WeightUse

TIMES = Path(__file__).with_name("layer_times.json")
# A coarser arithmetic must be this much quicker to be chosen: times of layers tell no finer.
WORTH = 0.95
# And save so many milliseconds of float's: below, what borders between arithmetics cost decides, which no row tells.
LEAST = 0.005
# From the nearest to the trained numbers to the coarsest.
MODES: tuple[ActivationMode, ...] = ("float", "dynamic", "int8")
_NORMS = ("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "instance_norm")
# What runs in a reference kernel in some arithmetic of some runtime, and not in others.
_KINDS = {
    "silu": "silu", "hardswish": "hardswish", "hardsigmoid": "hardsigmoid", "mean": "mean",
    **dict.fromkeys(_NORMS, "norm"),
    **dict.fromkeys(("gelu", "erf", "mish", "softplus"), "gelu"),
    **dict.fromkeys(("sigmoid", "tanh"), "sigmoid"),
    **dict.fromkeys(("add", "sub", "mul", "div"), "elementwise"),
    **dict.fromkeys(("scaled_dot_product_attention", "matmul", "bmm"), "attention"),
    "cat": "join",
}  # fmt: skip
# What a layer's time is made of: calls, multiply-accumulates, and numbers read and written.
Times = tuple[float, float, float]


def quickest(runtime: str, inventory: Inventory, wanted: ActivationMode) -> ActivationMode:
    """The quickest arithmetic for a model of those no coarser than ``wanted``; that where nothing was measured."""
    if wanted not in MODES or runtime not in _times():
        return wanted
    times = {mode: predicted(runtime, inventory, mode) for mode in MODES[: MODES.index(wanted) + 1]}
    best: ActivationMode = "float"
    for mode, time in times.items():
        if time < min(WORTH * times[best], times["float"] - LEAST):
            best = mode
    return best


def slower(runtime: str, inventory: Inventory, mode: ActivationMode) -> tuple[float, float] | None:
    """Milliseconds of the measured layers in ``mode`` and in float, where ``mode`` is the slower one; else None."""
    if mode not in MODES or runtime not in _times():
        return None
    asked, plain = (predicted(runtime, inventory, one) for one in (mode, MODES[0]))
    return (asked, plain) if WORTH * asked > plain else None


def predicted(runtime: str, inventory: Inventory, mode: ActivationMode) -> float:
    """Milliseconds of a model's layers where they were measured, one thread; what has no row counts nothing."""
    rows = _times().get(runtime, {})
    total = 0.0
    for kind, amounts in amounts_of(inventory).items():
        if kind in rows:
            total += sum(time * amount for time, amount in zip(rows[kind][mode], amounts, strict=True))
    return total / 1e6


def amounts_of(inventory: Inventory) -> dict[str, Times]:
    """For each kind of layer: how many there are, their thousands of multiply-accumulates, and of numbers that they
    read and write."""
    uses = {use.name: use for use in inventory.weights}
    found: dict[str, Times] = {}
    for cost in inventory.ops:
        kind = kind_of(cost, uses)
        if kind:
            layers, macs, numbers = found.get(kind, (0.0, 0.0, 0.0))
            moved = cost.elements_in + cost.elements_out
            found[kind] = (layers + 1, macs + cost.macs / 1000, numbers + moved / 1000)
    return found


def kind_of(cost: OpCost, uses: Mapping[str, WeightUse]) -> str:
    """The row of an operator in the table of times; empty when it has none."""
    name = cost.op.removeprefix("aten.").split(".")[0]
    if name in _KINDS:
        return _KINDS[name]
    read = [uses[weight] for weight in cost.weights if weight in uses and uses[weight].op != "other"]
    if not read:
        return ""
    use = read[0]
    # One row, or one pixel: no weight serves twice.
    once = cost.elements_out <= use.shape[use.channel_axis]
    if use.op == "linear":
        return "linear_row" if once else "linear"
    if use.op == "depthwise_conv":
        return use.op
    if use.op not in ("conv", "conv_transpose"):
        return ""
    if use.groups > 1:
        return "grouped_conv"
    if max(use.shape[2:], default=1) > 1:
        return "conv"
    return "pixel_conv" if once else "pointwise_conv"


@functools.cache
def _times() -> dict[str, dict[str, dict[str, Times]]]:
    """Runtime -> kind of layer -> arithmetic -> nanoseconds of a layer, of a thousand of its multiply-accumulates, and
    of a thousand numbers."""
    found: dict[str, Any] = json.loads(TIMES.read_text(encoding="utf-8"))
    times: dict[str, dict[str, dict[str, Times]]] = {}
    for runtime, kinds in found["nanoseconds"].items():
        times[runtime] = {}
        for kind, row in kinds.items():
            times[runtime][kind] = {mode: (values[0], values[1], values[2]) for mode, values in row.items()}
    return times
