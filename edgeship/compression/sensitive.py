"""Weights that get more bits, because what they lose is most of what the outputs lose.

An STFT's or a mel basis feeds a logarithm, a first depthwise layer of 288 weights decides everything after it: each
loses more than all other layers together, and weighs next to nothing. Found by measurement alone: each is rounded to
nearest by itself, the model runs from there on, and its error is taken in every slice of every output
(`program.slices`) and every sample. Errors of several weights add, as independent noise does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeship.compression.encode import Encoder
from edgeship.compression.walk import Layer, Operators, walk
from edgeship.core.encodings import stored_bits
from edgeship.core.weights import Float
from edgeship.program.slices import NOTHING, Slice, slices_of

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from edgeship.core.inventory import WeightUse
    from edgeship.core.weights import Encoding
    from edgeship.program.program import TorchProgram

    Array = npt.NDArray[Any]

# Samples at most, and multiply-accumulates that may be spent: seconds, not minutes.
SAMPLES = 12
BUDGET = 1e11
# A weight that makes less than this share of the error in the slice that it would help is not an exception.
DOMINATES = 0.05
# What all exceptions together may add to the bytes of all weights, for 8 bits and for fewer; and what they may in small
# models, three quarters as much again at most. Weights that stay in float (of a GRU, say) count as float16.
SHARE, SHARE_OF_SHORT = 0.08, 0.20
FEW_BYTES = 256_000
# A slice of fewer numbers than these says little in one sample.
HANDFUL = 16
# Noise over signal at most: what is lost beyond this is lost.
MOST = 1e3


@dataclass(frozen=True)
class Sensitive:
    """What was found.

    Args:
        kept: weight -> the encoding with more bits that it gets instead.
        losses: weight -> noise over signal in the worst slice with it alone as wanted.
        before_db, after_db: the worst slice with all weights as wanted, and with the exceptions, by the sum of losses.
    """

    kept: dict[str, Encoding] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    before_db: float = 200.0
    after_db: float = 200.0


def find_sensitive(
    program: TorchProgram,
    wanted: Mapping[str, Encoding],
    wider: Callable[[WeightUse, Encoding], Encoding | None],
    batches: Sequence[Mapping[str, Any]],
    floor_db: float,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Sensitive:
    """Exceptions until the worst slice of an output keeps ``floor_db``, those that bring most first.

    Args:
        wanted: weight -> encoding. wider: the next encoding of a weight that the runtime holds; None where
            there is none.
        batches: inputs by name, NumPy; as many are used as there is time for. None of them measures nothing.
    """
    import numpy as np

    uses = {use.name: use for use in program.record.inventory.weights if use.name in wanted}
    work = program.record.inventory.macs * max(len(uses), 1) / 2
    count = min(SAMPLES, len(batches), int(BUDGET / max(work, 1)))
    if count == 0 or not uses:
        return Sensitive()
    # Spread evenly over what was given.
    chosen = [batches[index * len(batches) // count] for index in range(count)]
    rows = _alone(program, wanted, chosen, progress)
    if not any(row.size for row in rows.values()):
        return Sensitive()
    allowed = 10 ** (-floor_db / 10)
    losses = {name: float(row.max(initial=0)) for name, row in rows.items()}
    # [slices x samples]: errors of several weights add, as independent noise does.
    total = np.sum(list(rows.values()), axis=0)
    before = _decibels(total)
    # Bytes that all exceptions together may still add.
    spare = _room(program.record.inventory.weights, wanted)
    kept: dict[str, Encoding] = {}
    while float(total.max(initial=0)) > allowed:
        left = {name: (uses[name], wanted[name]) for name in rows if name not in kept}
        best = _best(rows, total, allowed, spare, left, wider)
        if best is None:
            break
        name, encoding, extra = best
        kept[name] = encoding
        spare -= extra
        total = np.maximum(total - rows[name], 0)
    return Sensitive(kept, losses, before, _decibels(total))


def _best(
    rows: Mapping[str, Array],
    total: Array,
    allowed: float,
    spare: int,
    left: Mapping[str, tuple[WeightUse, Encoding]],
    wider: Callable[[WeightUse, Encoding], Encoding | None],
) -> tuple[str, Encoding, int] | None:
    """The exception that takes most from what fails, with its bytes; None where none may be made.

    By the root of the bytes: by the bytes alone a few middling layers would use up what the costliest one needs.
    """
    failing = total > allowed
    found: tuple[float, str, Encoding, int] | None = None
    for name, (use, encoding) in left.items():
        share = float((rows[name][failing] / total[failing]).max())
        larger = wider(use, encoding) if share >= DOMINATES else None
        if larger is None:
            continue
        extra = _bytes(use, larger) - _bytes(use, encoding)
        gain = float(rows[name][failing].max()) / max(extra, 1) ** 0.5
        if extra <= spare and (found is None or gain > found[0]):
            found = (gain, name, larger, extra)
    return None if found is None else found[1:]


def _bytes(use: WeightUse, encoding: Encoding) -> int:
    return -(-stored_bits(encoding, use, encoding.bits) // 8)


def _room(uses: Sequence[WeightUse], wanted: Mapping[str, Encoding]) -> int:
    """Bytes that exceptions may add."""
    short = any(encoding.bits < 8 for encoding in wanted.values())
    stored = sum(_bytes(use, wanted.get(use.name, Float(16))) for use in uses)
    return max(min(FEW_BYTES, 3 * stored // 4), int((SHARE_OF_SHORT if short else SHARE) * stored))


def _decibels(total: Array) -> float:
    import numpy as np

    return float(-10 * np.log10(max(float(total.max(initial=0)), 1e-20)))


def _alone(
    program: TorchProgram,
    wanted: Mapping[str, Encoding],
    batches: Sequence[Mapping[str, Any]],
    progress: Callable[[int, int, str], None],
) -> dict[str, Array]:
    """Weight -> noise over signal with it alone rounded, one number for each slice of an output and sample that say
    something; in the order of the graph."""
    import torch

    numbers = range(len(batches))
    operators = Operators(program, batches)
    encoder = Encoder(program, {}, "nearest")
    rows: dict[str, Array] = {}
    with torch.no_grad():
        answers = operators.answers(0, operators.inputs(numbers), {})
        if not answers[0]:
            return {}
        outputs = _Outputs(answers)

        def visit(layer: Layer) -> None:
            name = program.record.aliases.get(layer.use.name, layer.use.name)
            if name not in wanted or name in rows:
                return
            assert layer.answers is not None, "the walk is asked for them"
            progress(len(rows), len(wanted), f"{name} alone")
            tensor = encoder.encode_one(layer.use, wanted[name])
            rows[name] = outputs.noise(layer.answers(torch.from_numpy(tensor.dequantize().copy()), numbers))

        walk(program, batches, visit, answers=True, numbers_only=False)
    return rows


def _counted(size: int, energy: Array) -> Array:
    """The energy of a slice in each sample; 0 where it says nothing, beside other samples or by itself.

    A slice of a few numbers may be near zero in one sample by chance: there it counts as large as it usually is.
    """
    import numpy as np

    finite = np.where(np.isfinite(energy), energy, 0)
    usual = float(finite.mean()) if size < HANDFUL else 0.0
    return np.where(finite > NOTHING * finite.max(initial=0), finite.clip(min=usual), 0)


class _Outputs:
    """The float model's answers, in slices."""

    def __init__(self, answers: Sequence[Sequence[torch.Tensor]]) -> None:
        """``answers``: for each sample its outputs, each in its own shape."""
        import numpy as np

        self._wanted = self._stacked(answers)
        self._parts: list[tuple[int, Slice]] = [
            (place, part) for place, value in enumerate(self._wanted) for part in slices_of(np.nan_to_num(value))
        ]
        signal = [np.square(part.of(self._wanted[place])).sum(1) for place, part in self._parts]
        # A probe that the model cannot answer says nothing.
        self._signal = np.concatenate([_counted(part, row) for part, row in zip(self._sizes(), signal, strict=True)])

    def _sizes(self) -> list[int]:
        """How many numbers each slice has in a sample."""
        return [part.of(self._wanted[place]).shape[1] for place, part in self._parts]

    def noise(self, answers: Sequence[Sequence[torch.Tensor]]) -> Array:
        """Noise over signal of each slice and sample.

        One number for each slice and sample that says something: [counted].
        """
        import numpy as np

        made = self._stacked(answers)
        noise = [np.square(part.of(made[place] - self._wanted[place])).sum(1) for place, part in self._parts]
        counted = self._signal > 0
        with np.errstate(over="ignore", invalid="ignore"):
            found = np.concatenate(noise)[counted] / self._signal[counted]
        return np.asarray(np.nan_to_num(found, nan=MOST, posinf=MOST).clip(max=MOST))

    @staticmethod
    def _stacked(answers: Sequence[Sequence[torch.Tensor]]) -> list[Array]:
        """Each output of all samples, ``[samples, *shape]`` in float64, from the outputs of each sample."""
        import torch

        return [torch.stack(list(column)).double().numpy() for column in zip(*answers, strict=True)]
