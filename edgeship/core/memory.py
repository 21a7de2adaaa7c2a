"""What a model takes: bytes on disk and bytes in the app's memory, predicted from its inventory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from edgeship.core.choice import Choice
from edgeship.core.encodings import encoding_named, fitted
from edgeship.core.forms import ActivationMode
from edgeship.core.inventory import Inventory, WeightUse
from edgeship.core.runtimes import Runtime
from edgeship.core.weights import Encoding, Float


@dataclass(frozen=True)
class Footprint:
    """Bytes: weights as stored, weights as resident, activations at their peak, the engine itself, and the cache of a
    language model."""

    stored: int
    weights: int
    activations: int
    runtime: int
    cache: int = 0

    @property
    def memory(self) -> int:
        """What the app needs."""
        return self.weights + self.activations + self.runtime + self.cache


def encoding_of(choice: Choice) -> Encoding:
    """The encoding that a profile's word names; of ``auto`` the smallest that it may choose."""
    if choice.weights == "auto":
        return min((encoding_named(text) for text in choice.candidates), key=lambda item: item.bits)
    return encoding_named(choice.weights)


def predict(
    inventory: Inventory, runtime: Runtime, choice: Choice, *, tied: Collection[str] = frozenset()
) -> Footprint:
    """The footprint before anything is built. Weights that compression leaves alone are floats, as wide as the runtime
    computes in.

    Args:
        tied: weights that are stored under another's name.
    """
    encodings = {use.name: planned(choice, use) for use in inventory.weights if use.op != "other"}
    halves = runtime.float_bits(choice) == 16
    return footprint(inventory, runtime, encodings, choice.activations, halves=halves, tied=tied)


def footprint(
    inventory: Inventory,
    runtime: Runtime,
    encodings: Mapping[str, Encoding],
    activations: ActivationMode,
    *,
    halves: bool,
    tied: Collection[str] = frozenset(),
) -> Footprint:
    """The footprint with the encodings that were decided.

    Args:
        encodings: by weight name; what is not named is float. activations: how the operators compute.
        halves: floats are float16. tied: weights that are stored under another's name.
    """
    rest = Float(16 if halves else 32)
    stored = resident = 0
    for use in inventory.weights:
        if use.name in tied:
            continue
        if use.plain_bits and use.name not in encodings:
            plain = use.elements * use.bits_unencoded(halves=halves) // 8
            stored, resident = stored + plain, resident + plain
            continue
        encoding = encodings.get(use.name, rest)
        stored += runtime.stored_bits(use, encoding) // 8
        bits = runtime.resident_bits(use.op, encoding, activations)
        bits += runtime.working_bits(use.op, encoding, activations)
        if use.looked_up and use.op == "linear":
            bits += runtime.table_bits(encoding, activations)
        resident += use.elements * bits // 8
    working = inventory.peak_activation_elements * runtime.activation_bits(activations, rest.bits) // 8
    return Footprint(stored, resident, working, runtime.engine.overhead_bytes)


def planned(choice: Choice, use: WeightUse) -> Encoding:
    """The encoding that a profile's words mean for one weight; of ``auto`` the smallest that it may choose."""
    if (use.looked_up or use.op == "embedding") and choice.embeddings:
        return fitted(encoding_named(choice.embeddings), use)
    return fitted(encoding_of(choice), use)
