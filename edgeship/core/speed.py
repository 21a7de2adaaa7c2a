"""Which arithmetic is quickest for a model, from measured times of layers.

The times lie in `layer_times.json`, which ``python benchmarks/layer_times.py`` writes: for a runtime, a kind of layer
and an arithmetic the nanoseconds of a thousand units, and those that a layer takes whatever its size. A build reads
them and measures nothing: on a machine with other work it would decide by chance, and the same order would give two
artifacts (docs/decisions/0021).
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
# Kinds of layers whose units are numbers that they give; the units of all others are multiply-accumulates.
BY_ELEMENTS = ("norm", "silu", "hardswish", "gelu", "elementwise")
_NORMS = ("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "instance_norm")
# What runs in a reference kernel in some arithmetic of some runtime, and not in others.
_ACTIVATIONS = {"silu": "silu", "hardswish": "hardswish"} | dict.fromkeys(("gelu", "erf", "mish", "softplus"), "gelu")
_ELEMENTWISE = ("add", "sub", "mul", "div")
_PRODUCTS = ("scaled_dot_product_attention", "matmul", "bmm")


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
    uses = {use.name: use for use in inventory.weights}
    total = 0.0
    for cost in inventory.ops:
        kind = kind_of(cost, uses)
        if kind in rows:
            units = cost.elements_out if kind in BY_ELEMENTS else cost.macs
            fixed, rate = rows[kind][mode]
            total += fixed / 1e6 + rate * units / 1e9
    return total


def kind_of(cost: OpCost, uses: Mapping[str, WeightUse]) -> str:
    """The row of an operator in the table of times; empty when it has none."""
    name = cost.op.removeprefix("aten.").split(".")[0]
    if name in _NORMS:
        return "norm"
    if name in _ACTIVATIONS:
        return _ACTIVATIONS[name]
    if name in _ELEMENTWISE:
        return "elementwise"
    if name in _PRODUCTS:
        return "attention"
    read = [uses[weight] for weight in cost.weights if weight in uses and uses[weight].op != "other"]
    if not read:
        return ""
    use = read[0]
    if use.op == "linear":
        return "linear" if cost.elements_out > use.shape[0] else "linear_row"
    if use.op in ("conv", "conv_transpose"):
        return "conv" if use.groups == 1 else "grouped_conv"
    return "depthwise_conv" if use.op == "depthwise_conv" else ""


@functools.cache
def _times() -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """Runtime -> kind of layer -> arithmetic -> nanoseconds of a layer, and of a thousand of its units."""
    found: dict[str, Any] = json.loads(TIMES.read_text(encoding="utf-8"))
    fixed, rates = found["nanoseconds_of_a_layer"], found["nanoseconds_of_1000_units"]
    times: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for runtime, kinds in rates.items():
        times[runtime] = {}
        for kind, row in kinds.items():
            times[runtime][kind] = {mode: (fixed[runtime][kind][mode], rate) for mode, rate in row.items()}
    return times
