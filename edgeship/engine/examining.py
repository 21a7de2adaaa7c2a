"""Whether given data look like the model's inputs: refused when they cannot, remarked on when they may not.

Images of 0..255 for a network that wants normalised ones are compared with the original on the same wrong data, and
agree: nothing but their looks tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.core.model import Signature, TensorSpec, TorchModel
from edgeship.core.profile import DataRef
from edgeship.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

    Batch = Mapping[str, npt.NDArray[Any]]

SAMPLES = 16
# Values may leave the range that is said by this share of it: images are resized and padded.
ROOM = 0.5
_FIX = "scale them as in training; if they are right, say low and high of the input in sample.toml"


def examine(data: DataRef, model: TorchModel, signature: Signature) -> tuple[str, ...]:
    """Remarks on data that look unlike the inputs that the model wants.

    Raises:
        DataError: values far outside the range of an input, or that the first layer never met in training.
    """
    from edgeship.data.batches import load_batches
    from edgeship.program.looks import look_at
    from edgeship.program.program import TorchProgram

    batches = load_batches(data.reference, signature, SAMPLES)
    floats = [spec for spec in signature.inputs if spec.is_float]
    for spec in floats:
        _within(data.shown, spec, batches)
    remarks = [
        f"{data.shown}: images are scaled to 0..1; no mean and std of {spec.name} are known (sample.toml says them)"
        for spec in floats
        if Path(data.reference).is_dir() and spec.mean is None
    ]
    if any(spec.low is None or spec.high is None for spec in floats):
        look = look_at(TorchProgram.open(model), batches)
        if look is not None and look.wrong:
            raise DataError(f"{data.shown} does not look like what the model was trained on: {look}", fix=_FIX)
        if look is not None and look.doubtful:
            remarks.append(f"{data.shown} may be scaled in another way than in training: {look}")
    return tuple(remarks)


def _within(reference: str, spec: TensorSpec, batches: Sequence[Batch]) -> None:
    low, high = _ends(spec)
    if low is None or high is None or not batches:
        return
    found = (
        min(float(batch[spec.name].min()) for batch in batches),
        max(float(batch[spec.name].max()) for batch in batches),
    )
    room = ROOM * (high - low)
    if found[0] < low - room or found[1] > high + room:
        raise DataError(
            f"{reference}: {spec.name} holds {found[0]:.4g} to {found[1]:.4g}, the model takes {low:.4g} to {high:.4g}",
            fix="scale it as the input's notes say (low, high, mean, std)",
        )


def _ends(spec: TensorSpec) -> tuple[float | None, float | None]:
    """The range that is said of an input, or that pixels of 0..1 have once they are normalised."""
    if spec.low is not None and spec.high is not None:
        return spec.low, spec.high
    if spec.mean is None and spec.std is None:
        return None, None
    mean, std = spec.mean or (0.0,), spec.std or (1.0,)
    count = max(len(mean), len(std))
    pairs = list(zip(mean * count if len(mean) == 1 else mean, std * count if len(std) == 1 else std, strict=False))
    return min(-m / s for m, s in pairs), max((1 - m) / s for m, s in pairs)
