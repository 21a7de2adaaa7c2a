"""Compare an artifact's answers with a reference's: signal-to-noise ratio, largest error, agreement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgeship.program.answers import Answers
from edgeship.program.slice_sums import SliceSums

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

# A ratio beyond this is equality up to float64 rounding; it keeps infinity out of reports.
MAX_SNR_DB = 200.0
# How much of an output is kept, to count its distinct values.
KEPT_ELEMENTS = 2_000_000
# Larger outputs are compared a part at a time.
PART_ELEMENTS = 1 << 21


@dataclass
class OutputError:
    """Running sums for one output over many samples. Integer outputs count as wrong or right, element by element.

    Where the reference is not finite there is nothing to compare with: such elements are left out and counted.

    Args:
        axes: axis -> sums of each of its slices, for axes longer than 1.
        unanswered: elements for which the reference is not finite. kept: some of the artifact's answers.
    """

    signal: float = 0.0
    noise: float = 0.0
    max_error: float = 0.0
    elements: int = 0
    different: int = 0
    is_float: bool = True
    first: Array | None = field(default=None, repr=False)
    varies: bool = False
    not_finite: bool = False
    axes: dict[int, SliceSums] = field(default_factory=dict, repr=False)
    unanswered: int = 0
    kept: list[Array] = field(default_factory=list, repr=False)

    def add(self, wanted: Array, found: Array, *, slices: bool = True) -> None:
        """Add one sample; ``slices``: with sums for each slice of it."""
        import numpy as np

        if self.first is None:
            self.first = np.array(wanted)
            self.is_float = bool(np.issubdtype(wanted.dtype, np.floating))
        elif not self.varies:
            scale = max(float(np.abs(self.first).max(initial=0)), 1e-30)
            moved = wanted if self.is_float else wanted.astype(np.float64)
            self.varies = float(np.abs(moved - self.first).max(initial=0)) > 1e-6 * scale
        long = next((axis for axis, size in enumerate(wanted.shape) if size > 1), None)
        if long is None or wanted.size <= PART_ELEMENTS:
            self._add_part(wanted, found, slices, long, 0)
        else:
            # Logits of a text are hundreds of millions of bytes in float64: a part at a time.
            rows = max(1, PART_ELEMENTS * wanted.shape[long] // wanted.size)
            for first in range(0, wanted.shape[long], rows):
                part = (*(slice(None),) * long, slice(first, first + rows))
                self._add_part(wanted[part], found[part], slices, long, first)
        if self.is_float and slices and sum(item.size for item in self.kept) + found.size <= KEPT_ELEMENTS:
            self.kept.append(np.array(found))

    def _add_part(self, wanted: Array, found: Array, slices: bool, long: int | None, first: int) -> None:
        """Add a sample, or the part of one that begins at ``first`` along the axis ``long``."""
        import numpy as np

        shape = self.first.shape if self.first is not None else wanted.shape
        if self.is_float and not bool(np.isfinite(wanted).all()):
            answered = np.isfinite(wanted)
            self.unanswered += int(wanted.size - answered.sum())
            wanted, found = np.where(answered, wanted, 0), np.where(answered, found, 0)
        wanted = wanted.astype(np.float64)
        difference = found.astype(np.float64) - wanted
        self.not_finite = self.not_finite or not bool(np.isfinite(found).all())
        self.signal += float((wanted**2).sum())
        self.noise += float((difference**2).sum())
        self.max_error = max(self.max_error, float(np.abs(difference).max(initial=0)))
        self.elements += int(wanted.size)
        self.different += int(np.count_nonzero(difference))
        for axis, size in enumerate(shape if self.is_float and slices else ()):
            if size > 1:
                sums = self.axes.setdefault(axis, SliceSums(size))
                sums.add(axis, wanted, difference, found, first if axis == long else 0)

    @property
    def snr_db(self) -> float:
        """Signal over noise power in dB; 200 when equal, 0 or less when noise drowns the signal or is not finite."""
        return -MAX_SNR_DB if self.not_finite else ratio_db(self.signal, self.noise)

    @property
    def has_signal(self) -> bool:
        """Whether the reference says anything: outputs well above rounding, and different for different inputs."""
        return self.varies and self.signal / max(self.elements, 1) > 1e-20


def ratio_db(signal: float, noise: float) -> float:
    """Signal over noise power in dB, within ``MAX_SNR_DB``; the least when there is noise and no signal."""
    import math

    if not math.isfinite(noise):
        return -MAX_SNR_DB
    if noise <= signal * 10 ** (-MAX_SNR_DB / 10):
        return MAX_SNR_DB
    return max(10 * math.log10(signal / noise), -MAX_SNR_DB) if signal > 0 else -MAX_SNR_DB


@dataclass
class Comparison:
    """All outputs of a model over many samples."""

    outputs: dict[str, OutputError] = field(default_factory=dict)
    samples: int = 0

    def add(self, wanted: Mapping[str, Array], found: Mapping[str, Array], *, slices: bool = True) -> None:
        """Add one sample; both by output name, ``found`` in any dtype."""
        self.samples += 1
        for name, value in wanted.items():
            self.outputs.setdefault(name, OutputError()).add(value, found[name], slices=slices)

    @property
    def snr_db(self) -> float:
        """The worst output's ratio, over outputs that carry a signal; integer outputs count by agreement below."""
        ratios = [output.snr_db for output in self.outputs.values() if output.is_float and output.signal > 0]
        return min(ratios, default=MAX_SNR_DB)

    @property
    def max_error(self) -> float:
        """The largest absolute difference of any float output."""
        return max((output.max_error for output in self.outputs.values() if output.is_float), default=0.0)

    @property
    def agreement(self) -> float:
        """Share of equal elements over integer outputs; 1 when there are none."""
        total = different = 0
        for output in self.outputs.values():
            if not output.is_float:
                total += output.elements
                different += output.different
        return 1 - different / total if total else 1.0

    @property
    def has_signal(self) -> bool:
        """Whether any output of the reference says something."""
        return any(output.has_signal for output in self.outputs.values())


class Reference:
    """A torch program as a callable on NumPy arrays by name.

    Args:
        ahead: inputs that will be asked for. A program too large for memory answers them all in one go, weight by
            weight, and inputs that were not announced one by one.
        kept: what other steps of the build have asked it.
    """

    def __init__(
        self,
        program: Any,
        *,
        quantized: bool = True,
        ahead: Sequence[Mapping[str, Array]] = (),
        kept: Answers | None = None,
    ) -> None:
        from edgeship.program.streamed import is_large, run_streamed

        self._program = program if is_large(program) and not program.activations else None
        self._signature = program.signature
        self._kept = kept or Answers(None)
        self._make: Callable[[], Any] = lambda: program.module(quantized=quantized)
        self._graph: Callable[[], Any] = lambda: program.exported.graph
        if self._program is not None:
            self._answers = dict(zip(map(_key, ahead), run_streamed(program, ahead) if ahead else [], strict=True))

    @cached_property
    def _module(self) -> Any:
        return self._make()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; inputs and outputs by the signature's names."""
        from edgeship.program.streamed import run_streamed

        if self._program is None:
            return self._kept.of(inputs, lambda: (self._run(inputs), ""))[0]
        known = self._answers.get(_key(inputs))
        return run_streamed(self._program, [inputs])[0] if known is None else known

    def undecided(self, inputs: Mapping[str, Array], within: float) -> Array:
        """Positions of a text where a router's choice of experts hangs on rounding, see `routers`; none in programs
        that are too large for memory."""
        from edgeship.program.routers import chooses, undecided

        whole = self._program is None and chooses(self._graph())
        return undecided(self._module if whole else None, self._tensors(inputs), within)

    def leave(self, batches: Sequence[Mapping[str, Array]]) -> None:
        """Answer inputs that will be asked for, where answers are kept, and let the weights go: they are read again for
        whatever else is asked."""
        if self._program is not None or not self._kept.keeps:
            return
        for batch in batches:
            self.run(batch)
        self.__dict__.pop("_module", None)

    def _tensors(self, inputs: Mapping[str, Array]) -> list[Any]:
        import numpy as np
        import torch

        return [torch.from_numpy(np.asarray(inputs[spec.name], order="C")) for spec in self._signature.inputs]

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        with torch.no_grad():
            results = self._module(*self._tensors(inputs))
        outputs = self._signature.outputs
        return {spec.name: result.numpy() for spec, result in zip(outputs, results, strict=True)}


def _key(inputs: Mapping[str, Array]) -> bytes:
    return b"".join(name.encode() + value.tobytes() for name, value in sorted(inputs.items()))
