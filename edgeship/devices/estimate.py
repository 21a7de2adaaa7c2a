"""Estimate the latency of a model on a device that is not here: a roofline over its operators.

Each operator takes the longer of two times: its arithmetic at a share of the unit's peak rate, and the bytes it moves
at the memory's bandwidth (Williams, Waterman, Patterson: "Roofline", CACM 2009). The estimate is their sum and a cost
per run.

Nothing here is fitted. What depends on a runtime is a figure of its own (`edgeship.core.runtimes.Roofline`), and the
band is wide on purpose. How it is made, and how far off it was, is told in ``docs/estimate.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from edgeship.core.choice import Choice
from edgeship.core.device import Device, Shipped
from edgeship.core.inventory import Inventory, OpCost, WeightUse
from edgeship.core.memory import planned
from edgeship.core.registry import find, runtimes, targets
from edgeship.core.report import Measurement
from edgeship.core.runtimes import Runtime
from edgeship.core.target import Target

# An estimate may be this many times too high or too low.
BAND = 3.0

# Operators that only rename or re-stride their input: no runtime spends time on them worth counting.
FREE = frozenset(
    f"aten.{name}"
    for name in (
        "view", "reshape", "permute", "transpose.int", "unsqueeze", "squeeze.dim", "squeeze.dims", "expand", "t",
        "slice.Tensor", "select.int", "flatten.using_ints", "unbind.int", "split.Tensor", "split_with_sizes", "chunk",
    )
)  # fmt: skip

# An operator whose activations fit here leaves them on the chip: the tightly coupled memory of Hexagon on these chips
# (executorch qc_schema.py; Apple publishes none, taken the same), and the smallest last-level cache (Raspberry Pi 5).
ON_CHIP_BYTES = {"npu": 8_000_000, "gpu": 2_000_000, "cpu": 2_000_000}


def estimate(
    inventory: Inventory,
    target: Target,
    runtime: str,
    choice: Choice,
    weight_bytes: Mapping[str, int] | None = None,
) -> Measurement:
    """The latency of one run, in ms, estimated, with its band.

    Args:
        inventory: weights and operators of the program.
        target: the device, with its peak rates and bandwidth.
        runtime: name of the engine that runs the artifact.
        choice: how weights are stored and activations computed.
        weight_bytes: bytes of each weight as stored, by name; by default what ``choice`` makes of it.

    Returns:
        A measurement without a value, and with the reason in its note, when the runtime does not run on the target or
        the target lacks a figure.
    """
    found = _roofline(inventory, target, runtimes()[runtime], choice, weight_bytes or {})
    if isinstance(found, str):
        return _none(target, runtime, found)
    return _figure("latency_estimate", found, 1e3, "ms", target, runtime)


def estimate_text(
    inventory: Inventory,
    target: Target,
    runtime: str,
    choice: Choice,
    tokens: int,
    weight_bytes: Mapping[str, int] | None = None,
) -> tuple[Measurement, Measurement]:
    """Tokens a second that a language model reads (``prefill``) and writes (``decode``), estimated, with their bands.

    Writing takes one token at a time: the arithmetic of one, and all weights once. Caches count nothing, so this is
    the speed at the start of a text.

    Args:
        inventory: of the model over a text of ``tokens``.
        target, runtime, choice, weight_bytes: as for `estimate`.
    """
    engine, stored = runtimes()[runtime], weight_bytes or {}
    read, written = (_roofline(inventory, target, engine, choice, stored, share) for share in (1.0, 1 / tokens))
    if isinstance(read, str) or isinstance(written, str):
        note = read if isinstance(read, str) else str(written)
        return _none(target, runtime, note, "prefill"), _none(target, runtime, note, "decode")
    return (
        _figure("prefill", read, tokens, "tokens/s", target, runtime),
        _figure("decode", written, 1, "tokens/s", target, runtime),
    )


@dataclass(frozen=True)
class _Time:
    """Seconds of one run, the least that moving its bytes takes, and what was computed where."""

    seconds: float
    moving: float
    arithmetic: str

    @property
    def least(self) -> float:
        return max(self.seconds / BAND, self.moving)


def _roofline(
    inventory: Inventory,
    target: Target,
    runtime: Runtime,
    choice: Choice,
    stored: Mapping[str, int],
    share: float = 1.0,
) -> _Time | str:
    """The time of one run over a ``share`` of the text that was counted, or why there is none."""
    if not runtime.runs_on(target):
        return f"{runtime.name} does not run on {target.title}"
    line = runtime.engine.roofline
    if line is None:
        return f"nothing is known of the speed of {runtime.title}"
    float_bits = runtime.float_bits(choice)
    dtype = {"int8": "int8", "dynamic": "int8", "int16": line.int16}.get(choice.activations, f"f{float_bits}")
    rate = target.peak_ops_s.get(f"{line.unit}.{dtype}")
    if rate is None:
        return f"no figure for {line.unit}.{dtype} of {target.title}"
    sizes = {weight.name: _read_bytes(weight, runtime, choice, stored) for weight in inventory.weights}
    bandwidth, speed = float(target.bandwidth_bytes_s.value), float(rate.value) * line.efficiency
    activation_bytes = share * runtime.activation_bits(choice.activations, float_bits) / 8
    moving = [_traffic(op, sizes, activation_bytes, ON_CHIP_BYTES[line.unit]) / bandwidth for op in inventory.ops]
    computing = [share * 2 * op.macs / speed for op in inventory.ops]
    seconds = line.run_seconds + sum(map(max, computing, moving))
    return _Time(seconds, sum(moving), f"{line.unit.upper()} in {dtype}")


def _figure(name: str, time: _Time, work: float, unit: str, target: Target, runtime: str) -> Measurement:
    """A time as a figure with its band: ``work`` milliseconds a second, or ``work`` tokens."""
    bounds = [time.seconds, time.least, time.seconds * BAND]
    found = [work * seconds if unit == "ms" else work / seconds for seconds in bounds]
    note = f"roofline on the {time.arithmetic}, not fitted to measurements: may be {BAND:g} times off"
    return Measurement(
        name, found[0], unit, "estimated", device=target.name, runtime=runtime, low=min(found), high=max(found),
        note=note,
    )  # fmt: skip


def _none(target: Target, runtime: str, note: str, name: str = "latency_estimate") -> Measurement:
    unit = "ms" if name == "latency_estimate" else "tokens/s"
    return Measurement(name, None, unit, "estimated", device=target.name, runtime=runtime, note=note)


def _read_bytes(weight: WeightUse, runtime: Runtime, choice: Choice, stored: Mapping[str, int]) -> float:
    """Bytes of a weight as the engine reads it: as stored, or wider where the engine unpacks it when it loads."""
    if weight.op == "other":
        return weight.elements * runtime.float_bits(choice) / 8
    encoding = planned(choice, weight)
    resident = runtime.resident_bits(weight.op, encoding, choice.activations)
    if resident > runtime.container_bits(weight.op, encoding):
        return weight.elements * resident / 8
    return float(stored.get(weight.name, weight.elements * encoding.bits / 8))


def _traffic(op: OpCost, sizes: Mapping[str, float], activation_bytes: float, on_chip_bytes: int) -> float:
    """Bytes that one operator moves to and from memory."""
    if op.op in FREE:
        return 0.0
    if op.op == "aten.embedding":
        # A lookup reads the rows that it returns, not the table.
        return float(op.elements_out * activation_bytes)
    activations = (op.elements_in + op.elements_out) * activation_bytes
    return sum(sizes.get(name, 0.0) for name in op.weights) + (activations if activations > on_chip_bytes else 0)


class Estimate(Device):
    """A roofline for a target that is not here."""

    name: ClassVar[str] = "estimate"
    argument: ClassVar[str] = "TARGET"
    summary: ClassVar[str] = "a rough estimate for a target, with a wide band"

    def measure(self, shipped: Shipped, argument: str, seconds: float) -> tuple[Measurement, ...]:
        """As `estimate`, or `estimate_text` for a language model, with the weights as the artifact stores them."""
        target = find("target", targets(), argument)
        runtime = shipped.artifact.runtime
        if runtimes()[runtime].engine.for_language:
            tokens = shipped.artifact.signature.inputs[0].shape[-1]
            return estimate_text(shipped.inventory, target, runtime, shipped.choice, tokens, shipped.weight_bytes)
        return (estimate(shipped.inventory, target, runtime, shipped.choice, shipped.weight_bytes),)


DEVICE = Estimate()
