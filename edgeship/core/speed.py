"""Which arithmetic is quickest for a model, from measured times of layers.

The times lie in `layer_times.json`, which ``python benchmarks/layer_times.py`` writes: for a runtime, a kind of layer
and an arithmetic the nanoseconds of a thousand units. A build reads them and measures nothing: on a machine with other
work it would decide by chance, and the same order would give two artifacts (docs/decisions/0021).
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
# From the nearest to the trained numbers to the coarsest.
MODES: tuple[ActivationMode, ...] = ("float", "dynamic", "int8")
# Kinds of layers whose units are numbers that they give; the units of all others are multiply-accumulates.
BY_ELEMENTS = ("norm", "activation")
_NORMS = ("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "instance_norm")
_ACTIVATIONS = ("gelu", "silu", "mish", "hardswish", "softplus", "erf")
_PRODUCTS = ("scaled_dot_product_attention", "matmul", "bmm")


def quickest(runtime: str, inventory: Inventory, wanted: ActivationMode) -> ActivationMode:
    """The quickest arithmetic for a model of those no coarser than ``wanted``; that where nothing was measured."""
    if wanted not in MODES or runtime not in _times():
        return wanted
    times = {mode: predicted(runtime, inventory, mode) for mode in MODES[: MODES.index(wanted) + 1]}
    best: ActivationMode = "float"
    for mode, time in times.items():
        if time < WORTH * times[best]:
            best = mode
    return best


def predicted(runtime: str, inventory: Inventory, mode: ActivationMode) -> float:
    """Milliseconds of a model's layers where they were measured, one thread; what has no row counts nothing."""
    rates = _times().get(runtime, {})
    uses = {use.name: use for use in inventory.weights}
    total = 0.0
    for cost in inventory.ops:
        kind = kind_of(cost, uses)
        if kind in rates:
            total += rates[kind][mode] * (cost.elements_out if kind in BY_ELEMENTS else cost.macs) / 1e9
    return total


def kind_of(cost: OpCost, uses: Mapping[str, WeightUse]) -> str:
    """The row of an operator in the table of times; empty when it has none."""
    name = cost.op.removeprefix("aten.").split(".")[0]
    if name in _NORMS:
        return "norm"
    if name in _ACTIVATIONS:
        return "activation"
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
def _times() -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, Any] = json.loads(TIMES.read_text(encoding="utf-8"))
    times: dict[str, dict[str, dict[str, float]]] = found["nanoseconds_of_1000_units"]
    return times
