"""Inputs that a check asks about beside noise: silence, a flat image, values of a pixel, tiny, huge, and sparse ones.

Noise of one size hides what apps meet: an epsilon that vanished shows on zeros, a square that overflowed on large
values, a variance taken as a difference of squares on a large mean with a small spread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeship.core.model import Signature, TensorSpec
from edgeship.data.batches import draw

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]

# Kinds of inputs of the size that networks are fed with.
ORDINARY = ("zeros", "one constant", "0..1", "sparse")
# Values that a range given for an input may be missed by: it is written in a few digits.
SLACK = 1e-3


@dataclass(frozen=True)
class Probe:
    """Inputs of one kind, by name."""

    kind: str
    batch: dict[str, Array]


def _kinds() -> Mapping[str, Draw]:
    import numpy as np

    def sparse(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
        kept = generator.random(shape) < 0.05
        return np.asarray(generator.standard_normal(shape) * kept)

    return {
        "zeros": lambda generator, shape: np.zeros(shape),
        "one constant": lambda generator, shape: np.full(shape, 0.5),
        "0..1": lambda generator, shape: generator.random(shape),
        "0..255": lambda generator, shape: generator.integers(0, 256, shape).astype(np.float64),
        "noise x 1e-3": lambda generator, shape: 1e-3 * generator.standard_normal(shape),
        "noise x 1e3": lambda generator, shape: 1e3 * generator.standard_normal(shape),
        "large mean, small spread": lambda generator, shape: 100 + 0.01 * generator.standard_normal(shape),
        "sparse": sparse,
    }


def probe_batches(signature: Signature, seed: int = 0) -> list[Probe]:
    """One probe of each kind for a model with float inputs, integers varied beside them; kinds of integers for a model
    that takes nothing else.

    Where an input has a range (``low``, ``high``), kinds that leave it are left out, and its ends are asked about.
    """
    import numpy as np

    floats = [spec for spec in signature.inputs if spec.is_float]
    if not floats:
        return _integer_probes(signature, seed)
    generator = np.random.default_rng(seed + 1)
    made: list[Probe] = []
    for kind, function in _kinds().items():
        values = {spec.name: function(generator, spec.shape) for spec in floats}
        if all(_fits(spec, values[spec.name]) for spec in floats):
            made.append(Probe(kind, _batch(signature, values, generator, len(made))))
    for kind, end in (("the lowest value", "low"), ("the highest value", "high")):
        if all(getattr(spec, end) is not None for spec in floats):
            values = {spec.name: np.full(spec.shape, getattr(spec, end)) for spec in floats}
            made.append(Probe(kind, _batch(signature, values, generator, len(made))))
    return made


def _integer_probes(signature: Signature, seed: int) -> list[Probe]:
    """What real bytes and tokens are, and uniform ones are not: padding throughout, a narrow band, a rising run."""
    import numpy as np

    generator = np.random.default_rng(seed + 1)
    wide = {spec.name: spec for spec in signature.inputs if spec.high is not None and spec.high > 1}
    if not wide:
        return []

    def between(spec: TensorSpec, first: float, last: float) -> Array:
        low, high = int(spec.low or 0), int(spec.high or 0)
        ends = [low + round(share * (high - low)) for share in (first, last)]
        return np.asarray(generator.integers(ends[0], ends[1] + 1, spec.shape))

    def rising(spec: TensorSpec) -> Array:
        low, high = int(spec.low or 0), int(spec.high or 0)
        count = int(np.prod(spec.shape))
        return np.asarray((low + np.arange(count) % (high - low + 1)).reshape(spec.shape))

    kinds: dict[str, Callable[[TensorSpec], Array]] = {
        "the lowest integer": lambda spec: between(spec, 0, 0),
        "the highest integer": lambda spec: between(spec, 1, 1),
        "integers of a narrow band": lambda spec: between(spec, 0.35, 0.48),
        "integers that rise": rising,
    }
    probes: list[Probe] = []
    for place, (kind, function) in enumerate(kinds.items()):
        values = {name: function(spec) for name, spec in wide.items()}
        probes.append(Probe(kind, _batch(signature, values, generator, place)))
    return probes


def _fits(spec: TensorSpec, values: Array) -> bool:
    if spec.low is None or spec.high is None:
        return True
    slack = SLACK * (spec.high - spec.low)
    return bool(values.min() >= spec.low - slack and values.max() <= spec.high + slack)


def _batch(signature: Signature, floats: Mapping[str, Array], generator: Any, place: int) -> dict[str, Array]:
    import numpy as np

    # Arithmetic makes a plain number of an array without axes.
    return {
        spec.name: np.asarray(floats[spec.name], spec.numpy_dtype)
        if spec.name in floats
        else draw(spec, generator, place + 1)
        for spec in signature.inputs
    }
