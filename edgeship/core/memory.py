"""What a model takes: bytes on disk and bytes in the app's memory, predicted from its inventory."""

from __future__ import annotations

from dataclasses import dataclass

from edgeship.core.encodings import encoding_named, fitted, stored_bits
from edgeship.core.inventory import Inventory
from edgeship.core.profile import Choice
from edgeship.core.runtimes import Runtime
from edgeship.core.weights import Encoding, Float


@dataclass(frozen=True)
class Footprint:
    """Bytes: weights as stored, weights as resident, activations at their peak, and the engine itself."""

    stored: int
    weights: int
    activations: int
    runtime: int

    @property
    def memory(self) -> int:
        """What the app needs."""
        return self.weights + self.activations + self.runtime


def encoding_of(choice: Choice) -> Encoding:
    """The encoding that a profile's word names; of ``auto`` the smallest that it may choose."""
    if choice.weights == "auto":
        return min((encoding_named(text) for text in choice.candidates), key=lambda item: item.bits)
    return encoding_named(choice.weights)


def predict(inventory: Inventory, runtime: Runtime, choice: Choice) -> Footprint:
    """The footprint before anything is built. Weights that compression leaves alone are float32 (float16 in Core ML
    and Core AI, which compute in it)."""
    halves = runtime.name in ("coreml", "coreai")
    rest = Float(16 if halves or choice.weights == "float16" else 32)
    stored = resident = 0
    for use in inventory.weights:
        encoding = fitted(encoding_of(choice), use) if use.op != "other" else rest
        stored += stored_bits(encoding, use, runtime.container_bits(use.op, encoding)) // 8
        resident += use.elements * runtime.resident_bits(use.op, encoding, choice.activations) // 8
    width = {"int8": 1, "int16": 2}.get(choice.activations, 2 if halves else 4)
    return Footprint(stored, resident, inventory.peak_activation_elements * width, runtime.overhead_bytes)
