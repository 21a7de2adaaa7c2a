"""Compare rows that programs choose by scores as sets: which rows of one answer are in another, wherever they are.

Two scores that nearly tie change places under another rounding, and the row at the threshold comes or goes. So rows are
paired by what is in them. What one answer has and the other has not is an error, unless the program itself decides on
it by a hair: when its values are moved by a few roundings (`conditioning`), that row comes or goes too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeship.program.chosen import RowSet

    Array = npt.NDArray[Any]
    Answer = Mapping[str, Array]

# Two rows are the same where each number is within this share of what its column reaches, by the arithmetic: enough to
# know a row again. How near its numbers are is judged behind it, as for every output.
SAME: dict[str, float] = {"f32": 0.01, "f16": 0.03, "int16": 0.03, "int8": 0.1, "dynamic": 0.1}
# Columns of an output that reach less than this share of the largest column are measured by themselves: scores of 0 to
# 1 beside corners of 0 to 640. Corners are not, the left ones of few boxes may be small by chance.
APART = 1 / 64
HALF = 0.5


@dataclass
class Tally:
    """How many chosen rows two answers share, over many samples.

    Args:
        wanted: rows of the one. agreed: those that the other has too, in an order that the scores allow.
        lost: rows that the other has not. invented: rows of the other that the one has not. moved: rows out of order.
        close: rows that are left out because the program itself decides on them by a hair.
    """

    wanted: int = 0
    agreed: int = 0
    lost: int = 0
    invented: int = 0
    moved: int = 0
    close: int = 0

    def add(self, other: Tally) -> None:
        """Take another count into this one."""
        self.wanted += other.wanted
        self.agreed += other.agreed
        self.lost += other.lost
        self.invented += other.invented
        self.moved += other.moved
        self.close += other.close

    @property
    def faults(self) -> int:
        """How many rows differ."""
        return self.lost + self.invented + self.moved

    @property
    def share(self) -> float:
        """Agreed rows of all that one of both has; 1 where there is none."""
        whole = self.wanted + self.invented
        return self.agreed / whole if whole else 1.0

    def __str__(self) -> str:
        text = f"{self.agreed} of {self.wanted}"
        faults = ((self.lost, "lost"), (self.invented, "invented"), (self.moved, "out of order"))
        text += "".join(f", {count} {word}" for count, word in faults if count)
        return text + (f" ({self.close} chosen by a hair are left out)" if self.close else "")


@dataclass
class Columns:
    """What the columns of a set reach, and which of them hold whole numbers only, as classes and places do.

    Args:
        reach, whole: by output, ``[columns]``.
    """

    reach: dict[str, Array] = field(default_factory=dict)
    whole: dict[str, Array] = field(default_factory=dict)

    def widen(self, rows: RowSet, answer: Answer) -> None:
        """Take an answer of the program into account."""
        import numpy as np

        for part in _parts(rows, answer):
            for name, values in part.items():
                # [rows, columns] -> [columns]
                high = np.abs(values).max(0, initial=0.0)
                exact = (values == np.round(values)).all(0)
                self.reach[name] = np.maximum(self.reach.get(name, high), high)
                self.whole[name] = self.whole.get(name, exact) & exact

    def within(self, name: str, share: float, values: Array) -> Array:
        """How far numbers of the same row may be apart: ``[rows, columns] -> [columns]``."""
        import numpy as np

        own = np.abs(values).max(0, initial=0.0)
        reach = np.maximum(self.reach.get(name, own), own)
        most = float(reach.max(initial=0.0))
        size = np.where(reach < most * APART, reach, most)
        whole = self.whole.get(name, np.zeros(len(reach), bool))
        return np.where(whole, HALF, np.maximum(share * size, 1e-12))


@dataclass(frozen=True)
class Compared:
    """An answer whose rows stand where those of the other stand, and the count of those that differ.

    Args:
        answer: by output; rows that are judged by the count are as wanted.
    """

    answer: dict[str, Array]
    tally: Tally


def compare_rows(
    rows: RowSet,
    columns: Columns,
    wanted: Answer,
    found: Answer,
    share: float,
    others: Callable[[], Sequence[Answer]] = lambda: (),
) -> Compared:
    """Pair the rows of one answer with those of another.

    Args:
        wanted: what the program answers. found: what is compared with it.
        share: see `SAME`. others: what the program answers when its values are moved; asked for only where rows differ.
    """
    import numpy as np

    answer, tally = dict(found), Tally()
    made = {name: np.array(wanted[name], order="C") for name in rows.axes}
    wanted_parts, found_parts = list(_parts(rows, wanted)), list(_parts(rows, found))
    for place, (ours, theirs) in enumerate(zip(wanted_parts, found_parts, strict=True)):
        if not all(bool(np.isfinite(values).all()) for values in (*ours.values(), *theirs.values())):
            # What is not finite is a fault of its own, and shows where it is.
            return Compared(answer, tally)
        pairing = _Pairing.of(columns, ours, theirs, share)
        if not pairing.whole:
            moved = [list(_parts(rows, other))[place] for other in others()]
            pairing.excuse(columns, moved, share)
        tally.add(pairing.tally())
        for name in rows.axes:
            _placed(made[name], rows.axes[name], place, pairing, np.asarray(found[name]))
    answer.update(made)
    if rows.count:
        tally.invented += _left_behind(rows, found)
        # Counted as rows.
        answer[rows.count] = np.asarray(wanted[rows.count]).astype(np.asarray(found[rows.count]).dtype)
    return Compared(answer, tally)


def _parts(rows: RowSet, answer: Answer) -> Iterator[dict[str, Array]]:
    """The rows that count, for each place on the axes before that of the rows: output -> ``[rows, columns]``."""
    import numpy as np

    tables: dict[str, Array] = {}
    for name, axis in rows.axes.items():
        values = np.asarray(answer[name]).astype(np.float64)
        lead = int(np.prod(values.shape[:axis], dtype=np.int64))
        # [before, ..., rows, columns, ...] -> [before, rows, columns]
        tables[name] = values.reshape(lead, values.shape[axis], -1)
    size = min(table.shape[1] for table in tables.values())
    for place in range(min(len(table) for table in tables.values())):
        part = {name: table[place] for name, table in tables.items()}
        count = int(np.asarray(answer[rows.count]).reshape(-1)[0]) if rows.count else _filled(part)
        yield {name: values[: min(max(count, 0), size)] for name, values in part.items()}


def _filled(part: Mapping[str, Array]) -> int:
    """How many rows there are before those that hold zeros alone, as a program fills them up. A single number is no
    row of zeros."""
    import numpy as np

    whole = np.concatenate(list(part.values()), 1)
    used = np.flatnonzero(whole.any(1))
    if whole.shape[1] < 2:
        return len(whole)
    return int(used[-1]) + 1 if len(used) else 0


def _left_behind(rows: RowSet, answer: Answer) -> int:
    """How many rows that do not count hold anything but zeros."""
    import numpy as np

    count = int(np.asarray(answer[rows.count]).reshape(-1)[0])
    filled = 0
    for name, axis in rows.axes.items():
        # [..., rows, ...] -> [rows, ...]
        lines = np.moveaxis(np.asarray(answer[name]), axis, 0)[max(count, 0) :]
        filled = max(filled, int(lines.reshape(len(lines), -1).any(1).sum()) if lines.size else 0)
    return filled


def _placed(made: Array, axis: int, place: int, pairing: _Pairing, found: Array) -> None:
    """Write the found rows of pairs where the wanted ones are. Both ``[before, ..., rows, ...]``."""
    lead = made.shape[:axis]
    shape = (-1, *made.shape[axis:])
    target = made.reshape(shape)[place]
    source = found.reshape((-1, *found.shape[len(lead) :]))[place]
    for row, other in enumerate(pairing.to):
        if other >= 0:
            target[row] = source[other]


@dataclass
class _Pairing:
    """Rows of one answer and the rows of another that they are.

    Args:
        to: for each wanted row the found one, -1 for none. ``[wanted]``. invented: found rows that are no one's.
        out: wanted rows that stand in an order that the scores forbid. close: wanted rows that are left out.
        ours, theirs: the rows.
    """

    to: Array
    invented: list[int]
    ours: dict[str, Array]
    theirs: dict[str, Array]
    out: set[int] = field(default_factory=set)
    close: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, columns: Columns, ours: dict[str, Array], theirs: dict[str, Array], share: float) -> _Pairing:
        """Pair what is nearest first."""
        to = _nearest(columns, ours, theirs, share)
        free = set(range(_length(theirs))) - set(to.tolist())
        made = cls(to, sorted(free), ours, theirs)
        made.out = made._out_of_order(columns, share)
        return made

    @property
    def whole(self) -> bool:
        """Whether both have the same rows in an order that both allow."""
        return not self.invented and not self.out and bool((self.to >= 0).all())

    def _out_of_order(self, columns: Columns, share: float) -> set[int]:
        """Wanted rows that a later one has passed, though the numbers that the rows are in order of are apart."""
        import numpy as np

        rows = np.flatnonzero(self.to >= 0)
        places = self.to[rows]
        if bool((np.diff(places) > 0).all()):
            return set()
        # [rows, rows]: the first before the second here, and behind it there
        turned = (places[:, None] > places[None]) & (rows[:, None] < rows[None])
        for name, values in self.ours.items():
            width = columns.within(name, share, values)
            for column in range(values.shape[1]):
                steps, line = np.diff(values[:, column]), values[rows, column]
                # Classes and places say nothing of an order.
                exact = bool((line == np.round(line)).all())
                if not exact and bool((steps <= 0).all() or (steps >= 0).all()):
                    turned &= np.abs(line[:, None] - line[None]) > width[column]
        return set(rows[turned.any(1)].tolist())

    def excuse(self, columns: Columns, others: Sequence[dict[str, Array]], share: float) -> None:
        """Leave out rows that come, go or change places when the program's own values are moved.

        Where it finds others by that, an artifact may find others again, as many at most.
        """
        import numpy as np

        most = 0
        for other in others:
            to = _nearest(columns, self.ours, other, share)
            gone = set(np.flatnonzero((to < 0) & (self.to < 0)).tolist())
            self.close |= gone | (self.out & _turned(to))
            most = max(most, _length(other) - int((to >= 0).sum()))
        self.out -= self.close
        self.invented = self.invented[most:]

    def tally(self) -> Tally:
        """What the pairs come to."""
        lost = {row for row, other in enumerate(self.to.tolist()) if other < 0} - self.close
        wanted = len(self.to) - len(self.close)
        return Tally(
            wanted, wanted - len(lost) - len(self.out), len(lost), len(self.invented), len(self.out), len(self.close)
        )


def _turned(to: Array) -> set[int]:
    """Rows that another one has passed; ``to`` as in `_Pairing`."""
    import numpy as np

    rows = np.flatnonzero(to >= 0)
    places = to[rows]
    passed = (places[:, None] > places[None]) & (rows[:, None] < rows[None])
    return set(rows[passed.any(1) | passed.any(0)].tolist())


def _length(rows: Mapping[str, Array]) -> int:
    return min(len(values) for values in rows.values())


def _nearest(columns: Columns, ours: Mapping[str, Array], theirs: Mapping[str, Array], share: float) -> Array:
    """For each row of the one the row of the other that it is, -1 for none; rows in their places first. ``[rows]``."""
    import numpy as np

    widths = {name: columns.within(name, share, values) for name, values in ours.items()}
    count, number = _length(ours), _length(theirs)
    to = np.full(count, -1)
    shared = min(count, number)
    if not shared:
        return to
    here = np.zeros(shared)
    for name, width in widths.items():
        here = np.maximum(here, (np.abs(ours[name][:shared] - theirs[name][:shared]) / width).max(1, initial=0.0))
    # A row that is in its place to a third of what is allowed is not looked for elsewhere.
    settled = np.flatnonzero(here <= 1 / 3)
    to[settled] = settled
    left, free = np.flatnonzero(to < 0), np.setdiff1d(np.arange(number), settled)
    if not left.size or not free.size:
        return to
    # [left, free]: the largest difference of any number, in what is allowed of it
    apart = np.zeros((left.size, free.size))
    for name, width in widths.items():
        for column in range(len(width)):
            one, other = ours[name][left, column], theirs[name][free, column]
            np.maximum(apart, np.abs(one[:, None] - other[None]) / width[column], out=apart)
    for pair in np.argsort(apart, axis=None, kind="stable"):
        row, place = divmod(int(pair), free.size)
        if apart[row, place] > 1:
            break
        if to[left[row]] < 0 and free[place] not in to:
            to[left[row]] = free[place]
    return to


@dataclass
class RowTrial:
    """The sets of one program while an artifact is compared with it; without sets, answers are left as they are.

    Args:
        sets: see `row_sets`. share: see `SAME`. near, far: what the reference and the original answer to a batch when
            their values are moved.
    """

    sets: tuple[RowSet, ...]
    share: float
    near: Callable[[Answer], Sequence[Answer]]
    far: Callable[[Answer], Sequence[Answer]]
    columns: list[Columns] = field(default_factory=list)

    def learn(self, answers: Iterator[Answer]) -> None:
        """What columns reach and hold, from what the program answers."""
        self.columns = [Columns() for _ in self.sets]
        for answer in answers if self.sets else ():
            for rows, columns in zip(self.sets, self.columns, strict=True):
                columns.widen(rows, answer)

    def beside_reference(self, batch: Answer, wanted: Answer, found: Answer, tally: Tally) -> Answer:
        """``found`` with its rows where the reference has them; what differs goes into ``tally``."""
        return self._paired(wanted, found, tally, lambda: self.near(batch))

    def beside_original(self, batch: Answer, wanted: Answer, found: Answer, tally: Tally) -> Answer:
        """``found`` with its rows where the original has them; what differs goes into ``tally``."""
        return self._paired(wanted, found, tally, lambda: self.far(batch))

    def beside(self, wanted: Answer, found: Answer) -> Answer:
        """``found`` with its rows where ``wanted`` has them, whatever differs."""
        return self._paired(wanted, found, Tally(), lambda: ())

    def _paired(self, wanted: Answer, found: Answer, tally: Tally, others: Callable[[], Sequence[Answer]]) -> Answer:
        for rows, columns in zip(self.sets, self.columns, strict=True):
            compared = compare_rows(rows, columns, wanted, found, self.share, others)
            tally.add(compared.tally)
            found = compared.answer
        return found
