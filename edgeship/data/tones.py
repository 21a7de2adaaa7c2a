"""Sounds to measure on where none are given: noise says nothing of what a transform keeps apart.

White noise fills every bin of a spectrum, so that an error in one hides in the others; a tone that comes and goes does
not, and a logarithm behind the transform shows what leaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeship.core.model import Signature, TensorSpec

if TYPE_CHECKING:
    import numpy.typing as npt

    Batch = Mapping[str, npt.NDArray[Any]]

# Samples of a signal at least; what is shorter, or has more axes longer than this, is not a sound.
SHORTEST = 128
CHANNELS = 2
# How loud tones are, as the sound of a microphone is.
LOUDNESS = 0.3


def tones(signature: Signature, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """The batches with a tone that swells and fades in place of each input that may be a sound."""
    import numpy as np

    made: list[dict[str, Any]] = []
    for number, batch in enumerate(batches):
        values = dict(batch)
        for spec in signature.inputs:
            if not _may_be_sound(spec):
                continue
            time = np.arange(spec.shape[-1])
            # Octaves from 1/64 of the rate up, and a place of its own for each.
            pitch = 2.0 ** (number % 4) / 64
            place = spec.shape[-1] * (number + 1) / (len(batches) + 1)
            swell = np.exp(-(((time - place) / (spec.shape[-1] / 6)) ** 2))
            wave = LOUDNESS * np.sin(2 * np.pi * pitch * time) * swell
            values[spec.name] = np.broadcast_to(wave, spec.shape).astype(spec.numpy_dtype)
        made.append(values)
    return made


def _may_be_sound(spec: TensorSpec) -> bool:
    others = 1
    for size in spec.shape[:-1]:
        others *= size
    return spec.is_float and len(spec.shape) > 0 and spec.shape[-1] >= SHORTEST and others <= CHANNELS
