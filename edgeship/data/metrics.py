"""What an evaluation measures: accuracy, perplexity, cosine, signal-to-noise ratio, or a function of the user's.

A metric takes one sample after another: the inputs, what the artifact answered, what the original answered, and the
label when there is one. It ends in the figure of both and the *drop*, the share that is lost, which ``--max-drop``
bounds: points of accuracy, relative growth of perplexity, ``1 - cosine``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeship.core.records import suggest
from edgeship.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Arrays = Mapping[str, Array]


@dataclass(frozen=True)
class Score:
    """A metric's end: the artifact's figure, the original's, and the share lost (negative when the artifact gains)."""

    after: float
    before: float
    drop: float


class Metric(ABC):
    """One figure over an evaluation set. ``unit`` is how the figure reads: ``fraction``, ``perplexity``, ``dB`` ..."""

    name: str
    unit: str = "fraction"
    needs_labels: bool = False

    @abstractmethod
    def add(self, inputs: Arrays, found: Arrays, original: Arrays, label: Any) -> None:
        """Take one sample; outputs by name, in the signature's order."""

    @abstractmethod
    def score(self) -> Score:
        """The figures over every sample taken."""

    def describe(self, score: Score) -> str:
        """The figures in words, with their unit."""
        if self.unit == "fraction":
            return f"{self.name} {score.after:.2%} against {score.before:.2%} of the original"
        return f"{self.name} {score.after:.4g} against {score.before:.4g} of the original"

    def checked(self) -> Score:
        """`score`, or `DataError` when it is not a number."""
        score = self.score()
        if not all(map(math.isfinite, (score.after, score.before, score.drop))):
            raise DataError(
                f"the metric {self.name} is not a number ({score.after} against {score.before})",
                fix="check the evaluation data and the model's outputs",
            )
        return score


class Accuracy(Metric):
    """Share of samples whose highest score of the first output is the label's."""

    name = "accuracy"
    needs_labels = True

    def __init__(self) -> None:
        self.after = self.before = self.count = 0

    def add(self, inputs: Arrays, found: Arrays, original: Arrays, label: Any) -> None:
        """Count one sample. Raises `DataError` for a label that is none of the classes."""
        wanted = class_of(label, _first(original).size)
        self.after += top1(_first(found)) == wanted
        self.before += top1(_first(original)) == wanted
        self.count += 1

    def score(self) -> Score:
        """Both shares, and the points lost."""
        after, before = self.after / self.count, self.before / self.count
        return Score(after, before, before - after)


class Perplexity(Metric):
    """``exp`` of the mean cross-entropy of the next token; token ids ``(1, T)`` in, scores ``(1, T, V)`` out."""

    name = "perplexity"
    unit = "perplexity"

    def __init__(self) -> None:
        self.after = self.before = 0.0
        self.tokens = 0

    def add(self, inputs: Arrays, found: Arrays, original: Arrays, label: Any) -> None:
        """Add the cross-entropy of one window."""
        ids = next(iter(inputs.values())).reshape(-1)
        self.after += _cross_entropy(_first(found), ids)
        self.before += _cross_entropy(_first(original), ids)
        self.tokens += len(ids) - 1

    def score(self) -> Score:
        """Both perplexities, and how much it grew, relative."""
        after, before = math.exp(self.after / self.tokens), math.exp(self.before / self.tokens)
        return Score(after, before, after / before - 1)


class Cosine(Metric):
    """Mean cosine between the artifact's first output and the original's, flattened."""

    name = "cosine"
    unit = "cosine"

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, inputs: Arrays, found: Arrays, original: Arrays, label: Any) -> None:
        """Add one pair."""
        import numpy as np

        a, b = _first(found).astype(np.float64).reshape(-1), _first(original).astype(np.float64).reshape(-1)
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        self.total += float(a @ b) / norms if norms else math.nan
        self.count += 1

    def score(self) -> Score:
        """The mean; the original against itself is 1."""
        mean = self.total / self.count
        return Score(mean, 1.0, 1.0 - mean)

    def describe(self, score: Score) -> str:
        """The mean."""
        return f"cosine {score.after:.4f} to the original"


class SignalToNoise(Metric):
    """Signal over noise power of the first output against the original's, in dB; the drop is noise over signal."""

    name = "snr"
    unit = "dB"

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, inputs: Arrays, found: Arrays, original: Arrays, label: Any) -> None:
        """Add the powers of one sample."""
        import numpy as np

        wanted = _first(original).astype(np.float64)
        self.signal += float((wanted**2).sum())
        self.noise += float(((_first(found) - wanted) ** 2).sum())

    def score(self) -> Score:
        """The ratio, 200 dB when there is no noise."""
        if self.signal == 0:
            return Score(math.nan, 200.0, math.nan)
        share = max(self.noise / self.signal, 1e-20)
        return Score(-10 * math.log10(share), 200.0, share)

    def describe(self, score: Score) -> str:
        """The ratio."""
        return f"SNR {score.after:.1f} dB to the original"


class UserMetric(Metric):
    """A user's ``function(outputs, labels) -> float``, higher is better; outputs are lists of dicts, one a sample."""

    def __init__(self, reference: str, function: Callable[[list[Any], list[Any]], float]) -> None:
        self.name = reference
        self.unit = "value"
        self._function = function
        self._after: list[Any] = []
        self._before: list[Any] = []
        self._labels: list[Any] = []

    def add(self, inputs: Arrays, found: Arrays, original: Arrays, label: Any) -> None:
        """Keep one sample's outputs."""
        self._after.append(dict(found))
        self._before.append(dict(original))
        self._labels.append(label)

    def score(self) -> Score:
        """The function on both; the drop is relative to the original's figure."""
        try:
            after = float(self._function(self._after, self._labels))
            before = float(self._function(self._before, self._labels))
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise DataError(f"the metric {self.name} failed: {reason}", fix="it gets (outputs, labels)") from error
        return Score(after, before, (before - after) / abs(before) if before else before - after)


METRICS: dict[str, type[Accuracy | Perplexity | Cosine | SignalToNoise]] = {
    cls.name: cls for cls in (Accuracy, Perplexity, Cosine, SignalToNoise)
}


def find_metric(name: str) -> Metric:
    """A metric by name, or a user's ``file.py:function``. Raises `UsageError` with the nearest name."""
    if name in METRICS:
        return METRICS[name]()
    if ":" in name:
        from edgeship.data.functions import load_function

        return UserMetric(name, load_function(name))
    raise UsageError(f'no metric "{name}"', fix=f"{suggest(name, METRICS)} (or file.py:function)")


def top1(scores: Array) -> int:
    """The class with the highest score of one sample, ``[..., classes]``. Raises `DataError` when it is NaN."""
    import numpy as np

    if not bool(np.isfinite(scores).all()):
        raise DataError(
            "the model's scores are not finite, so accuracy cannot be measured", fix="check the artifact's inputs"
        )
    return int(np.argmax(scores.reshape(-1)))


def class_of(label: Any, classes: int) -> int:
    """A label as the number of a class. Raises `DataError` when it is not a whole number below ``classes``."""
    import numpy as np

    value = np.asarray(label)
    number = value.reshape(-1)[0] if value.size == 1 and value.dtype.kind in "biuf" else None
    if number is None or not np.isfinite(number) or number != int(number) or not 0 <= number < classes:
        raise DataError(
            f"the label {str(label)[:40]} is not one of the model's {classes} classes",
            fix=f"labels are integers from 0 to {classes - 1}",
        )
    return int(number)


def _first(outputs: Arrays) -> Array:
    return next(iter(outputs.values()))


def _cross_entropy(scores: Array, ids: Array) -> float:
    """Summed over positions 0..T-2, each against the next token."""
    import numpy as np

    if scores.ndim != 3 or scores.shape[1] != len(ids):
        raise DataError(f"perplexity needs scores of shape (1, T, V), not {scores.shape}", fix="choose another metric")
    rows = scores[0, :-1].astype(np.float64)
    rows -= rows.max(1, keepdims=True)
    normal = np.log(np.exp(rows).sum(1))
    return float((normal - rows[np.arange(len(rows)), ids[1:]]).sum())
