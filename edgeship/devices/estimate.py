"""Estimate the latency of a model on a device that is not here: a roofline over its operators.

Each operator takes the longer of two times: its arithmetic at a share of the unit's peak rate, and the bytes it moves
at the memory's bandwidth (Williams, Waterman, Patterson: "Roofline", CACM 2009). The estimate is their sum and a cost
per run.

Nothing here is fitted. The efficiencies are round figures whose origin stands beside them, and the band is wide on
purpose. How it is made, and how far off it was, is told in ``docs/estimate.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from edgeship.core.device import Device, Shipped
from edgeship.core.inventory import Inventory, OpCost, WeightUse
from edgeship.core.memory import encoding_of
from edgeship.core.profile import Choice
from edgeship.core.registry import find, targets
from edgeship.core.report import Measurement
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
ON_CHIP_BYTES = {"npu": 8_000_000, "cpu": 2_000_000}


@dataclass(frozen=True)
class Engine:
    """How one runtime uses a device.

    Args:
        unit: what it computes on, as in the target's ``peak_ops_s``.
        efficiency: share of the peak rate that a large convolution or matrix product reaches.
        run_seconds: time of an empty run: dispatch, synchronisation, input and output.
    """

    unit: str
    efficiency: float
    run_seconds: float


ENGINES = {
    # Apple's ResNet-50 on A17 Pro (Core ML Tools guide): 8.2e9 operations in 0.77 ms (W8A8) are 0.30 of the Neural
    # Engine's peak, in 1.38 ms (float16) 0.34 of it. MobileNetV3-small takes 0.13 ms on A16, nearly all of it dispatch.
    "coreml": Engine("npu", 0.32, 1.0e-4),
    # No figures are published: taken as Core ML's, on the same Neural Engine.
    "coreai": Engine("npu", 0.32, 1.0e-4),
    # The rates in Qualcomm targets are the best that any published model reached; typical layers reach about half.
    # The shortest run published for any model on Galaxy S24 is 0.056 ms.
    "qnn": Engine("npu", 0.5, 5.0e-5),
    # Unfitted: matrix kernels of XNNPACK and MLAS on hot caches, less what threads and phone clocks cost.
    "tflite": Engine("cpu", 0.5, 2.0e-5),
    "onnx": Engine("cpu", 0.5, 2.0e-5),
}


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
    engine = ENGINES.get(runtime)
    if engine is None or runtime not in target.runtime_names:
        return _none(target, runtime, f"{runtime} does not run on {target.title}")
    dtype, activation_bytes = _arithmetic(engine.unit, choice)
    rate = target.peak_ops_s.get(f"{engine.unit}.{dtype}")
    if rate is None:
        return _none(target, runtime, f"no figure for {engine.unit}.{dtype} of {target.title}")
    sizes = {weight.name: _read_bytes(weight, engine.unit, choice, weight_bytes or {}) for weight in inventory.weights}
    bandwidth, speed = float(target.bandwidth_bytes_s.value), float(rate.value) * engine.efficiency
    moving = [_traffic(op, sizes, activation_bytes, ON_CHIP_BYTES[engine.unit]) / bandwidth for op in inventory.ops]
    computing = [2 * op.macs / speed for op in inventory.ops]
    seconds = engine.run_seconds + sum(map(max, computing, moving))
    return Measurement(
        "latency_estimate",
        1e3 * seconds,
        "ms",
        "estimated",
        device=target.name,
        runtime=runtime,
        low=1e3 * max(seconds / BAND, sum(moving)),
        high=1e3 * seconds * BAND,
        note=f"roofline on the {engine.unit.upper()} in {dtype}, not fitted to measurements: may be {BAND:g} times off",
    )


def _none(target: Target, runtime: str, note: str) -> Measurement:
    return Measurement("latency_estimate", None, "ms", "estimated", device=target.name, runtime=runtime, note=note)


def _arithmetic(unit: str, choice: Choice) -> tuple[str, int]:
    """The dtype whose peak rate counts, and the bytes of one activation in memory."""
    if unit == "npu":
        # Hexagon runs 8-bit weights with 16-bit activations at the rate of float16 (AI Hub: 7.5 and 7.2 T/s on S24).
        return ("int8", 1) if choice.activations == "int8" else ("f16", 2)
    if choice.activations == "int8":
        return ("int8", 1)
    return ("int8", 4) if choice.activations == "dynamic" else ("f32", 4)


def _read_bytes(weight: WeightUse, unit: str, choice: Choice, stored: Mapping[str, int]) -> float:
    """Bytes of a weight as the unit reads it: as stored, by default as ``choice`` (``float16``, ``int8`` ...) says."""
    if weight.op == "other" or (unit == "cpu" and choice.activations == "float"):
        # Biases and norms are float32; LiteRT and ONNX Runtime widen the rest to it when they load a float model.
        return 4.0 * weight.elements
    bits = encoding_of(choice).bits
    return float(stored.get(weight.name, weight.elements * bits / 8))


def _traffic(op: OpCost, sizes: Mapping[str, float], activation_bytes: int, on_chip_bytes: int) -> float:
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
        """As `estimate`, with the weights as the artifact stores them."""
        target = find("target", targets(), argument)
        runtime = shipped.artifact.runtime
        return (estimate(shipped.inventory, target, runtime, shipped.choice, shipped.weight_bytes),)


DEVICE = Estimate()
