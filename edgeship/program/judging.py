"""From comparisons to findings: which slice of which output is worst, on which inputs, and against which limit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgeship.program.compare import MAX_SNR_DB, Comparison, OutputError, ratio_db
from edgeship.program.slice_sums import Group, SliceSums, groups

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

# Errors this far below a slice's usual size are none: on inputs a thousand times smaller, or zeros, what is left of an
# answer may be rounding. Static grids have one absolute step, so errors are held against the usual size itself.
FLOOR = 1e-3
STATIC_FLOOR = 1.0
# What weights in 8 bits lose is held against slices as they are on inputs of many kinds: a score that is near zero on
# one kind is as far off as it is on others.
STORED_FLOOR = 0.3
# Slices this far below the whole output are rounding of it: engines round sigmoids below 1e-8 to 0.
WHOLE_FLOOR = 1e-4
# Of an output of shares (a sigmoid's, a softmax's) this much is small: 1e-6 and 1e-4 both say no.
SHARE_FLOOR = 5e-2
# The smallest normal number of float16: accelerators round what is below to 0. Not for outputs that are small as a
# whole, of which it may take this share.
SMALLEST_HALF, SMALL_SHARE = 2.0**-14, 0.05
# An artifact may move this much more than the original itself does when its values are rounded once.
ROOM_DB = 20.0
# Below this the original's own answers move so much that there is nothing to compare with.
LEAST_DB = 3.0


@dataclass(frozen=True)
class Finding:
    """One group of slices on one kind of inputs.

    Args:
        kind: of inputs. output: its name. where: index of the slices, empty for the whole output.
        snr_db: found. limit_db: wanted there. lowered: the limit is less than the arithmetic's, because the original
            itself moves by rounding. distinct: distinct values of the artifact in what was kept of it.
        fault: what is wrong besides the ratio: not finite, or one constant.
    """

    kind: str
    output: str
    where: str
    snr_db: float
    limit_db: float
    lowered: bool = False
    distinct: int = 0
    fault: str = ""

    @property
    def passed(self) -> bool:
        """Whether it is within the limit."""
        return not self.fault and self.snr_db >= self.limit_db

    def __str__(self) -> str:
        place = f"{self.output}{self.where} on {self.kind}"
        return f"{place}: {self.fault}" if self.fault else f"{place}: {self.snr_db:.1f} dB"


@dataclass
class Scales:
    """Usual sizes: per output, axis and slice the largest root mean square over kinds of inputs that apps give.

    Args:
        shares: outputs between 0 and 1 by their making.
    """

    shares: frozenset[str] = frozenset()
    axes: dict[tuple[str, int], Array] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)

    def widen(self, comparison: Comparison) -> None:
        """Take a comparison's reference into account."""
        import numpy as np

        for name, error in comparison.outputs.items():
            size = (error.signal / max(error.elements, 1)) ** 0.5
            self.whole[name] = max(self.whole.get(name, 0.0), size)
            for axis, sums in error.axes.items():
                known = self.axes.get((name, axis))
                self.axes[name, axis] = sums.sizes if known is None else np.maximum(known, sums.sizes)

    def floor(self, output: str, group: Group, share: float, *, halves: bool = False) -> float:
        """Size below which an answer in a group is rounding, by the usual size of its slices and of the output."""
        import numpy as np

        sizes, whole = self.axes.get((output, group.axis)), self.whole.get(output, 0.0)
        # An output of one number has no axes: it is its only slice.
        known = whole if group.axis < 0 else 0.0
        if sizes is not None:
            known = float(np.sqrt(np.mean(np.square(sizes[list(group.places)]))))
        least = min(SMALLEST_HALF, SMALL_SHARE * whole) if halves else 0.0
        return max(share * known, WHOLE_FLOOR * whole, least, SHARE_FLOOR if output in self.shares else 0.0)


def judge(
    kind: str,
    found: Comparison,
    scales: Scales,
    limit_db: float,
    *,
    static: bool = False,
    halves: bool = False,
    stored: bool = False,
    own: Comparison | None = None,
) -> list[Finding]:
    """A finding for each group of slices of each float output, worst first.

    Args:
        found: the artifact's answers to one kind of inputs. scales: usual sizes.
        limit_db: of the arithmetic. static: the artifact has static integer grids. halves: it computes in float16.
        stored: what is judged is the loss of weights in few bits.
        own: how far the original moves by itself, see `conditioning`; the limit is not above that.
    """
    share = STORED_FLOOR if stored else FLOOR
    if static:
        share = STATIC_FLOOR
    findings: list[tuple[Finding, OutputError, Group | None]] = []
    for name, error in found.outputs.items():
        if not error.is_float or not error.elements:
            continue
        if error.not_finite:
            fault = Finding(kind, name, "", -MAX_SNR_DB, limit_db, fault="NaN or infinity")
            findings.append((fault, error, None))
            continue
        shape = error.first.shape if error.first is not None else ()
        lost = _lost(own, name, error, scales)
        for group in _groups(name, error, scales):
            size = scales.floor(name, group, share, halves=halves)
            # As a power, like the sums.
            floor = group.elements * size**2
            own_limit = min(lost, _own_limit(own, name, group, floor))
            where = group.where(shape) if group.axis >= 0 else ""
            ratio = ratio_db(max(group.signal, floor), group.noise)
            limit, lowered = min(limit_db, own_limit), own_limit < limit_db
            finding = Finding(kind, name, where, ratio, limit, lowered, fault=_fault(error, group, size))
            findings.append((finding, error, group))
    findings.sort(key=lambda item: (item[0].fault == "", item[0].snr_db - item[0].limit_db))
    if findings:
        worst, error, slices = findings[0]
        findings[0] = (replace(worst, distinct=_distinct(error, slices)), error, slices)
    return [finding for finding, _, _ in findings]


def _fault(error: OutputError, group: Group, size: float) -> str:
    if group.constant and group.rms > size and _varies(error, group):
        return "one constant, where the original's values vary"
    return ""


def _groups(name: str, error: OutputError, scales: Scales) -> Iterator[Group]:
    if not error.axes:
        yield Group(-1, (), error.elements, error.signal, error.noise)
    for axis, sums in error.axes.items():
        yield from groups(sums, axis, scales.axes.get((name, axis)))


def _own_limit(own: Comparison | None, output: str, group: Group, floor: float) -> float:
    if own is None:
        return MAX_SNR_DB
    error = own.outputs[output]
    if error.not_finite:
        return -MAX_SNR_DB
    signal, noise = (error.signal, error.noise) if group.axis < 0 else _sums(error.axes.get(group.axis), group)
    # It may have been asked fewer inputs than the artifact.
    share = error.elements / max(group.elements, 1) if group.axis < 0 else _share(error.axes.get(group.axis), group)
    return ratio_db(max(signal, share * floor), noise) - ROOM_DB


def _lost(own: Comparison | None, output: str, error: OutputError, scales: Scales) -> float:
    """The limit of every slice where rounding moves the original's output by more than the whole of it says; none else.

    There the places of what is left are chance: slices that rounding happened to spare once say nothing of others.
    """
    if own is None:
        return MAX_SNR_DB
    moved = own.outputs[output]
    whole = Group(-1, (), moved.elements, moved.signal, moved.noise)
    floor = moved.elements * scales.floor(output, whole, FLOOR) ** 2
    kept = ratio_db(max(moved.signal, floor), moved.noise)
    return kept - ROOM_DB if kept < LEAST_DB else MAX_SNR_DB


def _sums(sums: SliceSums | None, group: Group) -> tuple[float, float]:
    if sums is None:
        return 0.0, 0.0
    places = list(group.places)
    return float(sums.signal[places].sum()), float(sums.noise[places].sum())


def _share(sums: SliceSums | None, group: Group) -> float:
    return 1.0 if sums is None else sums.elements * len(group.places) / max(group.elements, 1)


def _varies(error: OutputError, group: Group) -> bool:
    """Whether the reference's values spread by more than a hundredth of their size in the group's slices."""
    import numpy as np

    sums = error.axes[group.axis]
    places = list(group.places)
    return bool(np.max(sums.high[places] - sums.low[places]) > 0.02 * group.rms)


def _distinct(error: OutputError, group: Group | None) -> int:
    """Distinct values of the artifact among the answers that were kept."""
    import numpy as np

    if group is None or group.axis < 0:
        parts = [item.reshape(-1) for item in error.kept]
    else:
        parts = [item.take(group.places, group.axis).reshape(-1) for item in error.kept]
    return len(np.unique(np.concatenate(parts))) if parts else 0


def unanswered(kinds: Mapping[str, Comparison]) -> dict[str, int]:
    """Elements that the original answers with NaN or infinity, by kind of inputs."""
    found: dict[str, int] = {}
    for kind, comparison in kinds.items():
        count = sum(error.unanswered for error in comparison.outputs.values())
        if count:
            found[kind] = count
    return found
