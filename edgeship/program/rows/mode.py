"""While active, a model that chooses rows by their values computes on all rows, and it is remembered which count.

``boxes[scores > 0.5]`` has as many rows as the values say, which no artifact can have. Here its result has all rows, in
their places, and `Rows` says which of them count; operators that work row by row keep that, those that choose again
narrow it, and those that would mix rows that count with others are written out (a sum, the largest, the best ``k``) or
refused. At the end `ChosenRows.settled` puts the rows that count first, zeros behind them, and adds their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from edgeship.compat.torch import WeakIdKeyDictionary, leaves_of
from edgeship.errors import OpenSizeError
from edgeship.program.suppression import CANDIDATES, first_true, looked_at

Tensor = torch.Tensor


@dataclass(frozen=True)
class Rows:
    """Which rows of a tensor count.

    Args:
        mask: bool, one for each row along ``axis``. first: whether those that count stand before the others.
        places: whether the tensor holds each row's own place, so that choosing by it moves nothing.
    """

    mask: Tensor
    axis: int = 0
    first: bool = False
    places: bool = False


Rule = Callable[["ChosenRows", Callable[..., Any], Sequence[Any], dict[str, Any]], Any]
# Rules by the plain name of a function; files beside this one fill it.
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register what is done in place of functions of these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise AssertionError(f"{name} has two rules")
            RULES[name] = function
        return function

    return register


class ChosenRows(TorchFunctionMode):
    """The mode. Rules run outside of it, on plain tensors.

    Args:
        candidates: how many boxes go into one suppression.
        known: whether the values of a tensor are there, so that what it chooses is as well.
    """

    def __init__(self, candidates: int = CANDIDATES, known: Callable[[Tensor], bool] = lambda value: False) -> None:
        super().__init__()
        self.candidates = candidates
        #: How many boxes each suppression was given.
        self.given: list[int] = []
        self.is_known = known
        self._rests = False
        self._rows: Any = WeakIdKeyDictionary()
        # Masks that were made of masks, so that what is chosen by the same ones has the same one.
        self._made: dict[tuple[Any, ...], tuple[Tensor, Sequence[Tensor]]] = {}
        self._narrower: dict[int, set[int]] = {}

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside, functions are called as they are, as they are in rules."""
        before, self._rests = self._rests, True
        try:
            yield
        finally:
            self._rests = before

    def rows(self, value: Any) -> Rows | None:
        """Which rows of a value count; None where all do."""
        return self._rows.get(value) if isinstance(value, Tensor) else None

    def marked(self, value: Tensor, rows: Rows | None) -> Tensor:
        """``value`` with these rows noted. Any shape."""
        if rows is None:
            self._rows.pop(value, None)
        else:
            self._rows[value] = rows
        return value

    def made(self, key: tuple[Any, ...], of: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor:
        """The mask that ``make`` makes of other masks, ``[N]``; for the same of them the same tensor."""
        whole = (*key, *(id(mask) for mask in of))
        if whole not in self._made:
            self._made[whole] = (make(), tuple(of))
        return self._made[whole][0]

    def noted(self, value: Tensor, mask: Tensor, *, first: bool) -> Tensor:
        """``value`` whose rows ``[N, ...]`` count as the mask ``[N]`` says; first: those that count come first."""
        return self.marked(value, Rows(mask, first=first))

    def both(self, one: Tensor, other: Tensor) -> Tensor:
        """Rows that count in both masks, ``[N]``."""
        if one is other or id(other) in self._narrower.get(id(one), ()):
            return one
        if id(one) in self._narrower.get(id(other), ()):
            return other
        found = self.made(("and",), (one, other), lambda: torch.logical_and(one, other))
        wider = self._narrower.setdefault(id(found), set())
        for mask in (one, other):
            wider |= {id(mask), *self._narrower.get(id(mask), ())}
        return found

    def in_front(self, value: Tensor) -> Tensor:
        """``value`` with the rows that count first, in their order. Any shape."""
        rows = self.rows(value)
        if rows is None or rows.first:
            return value
        place, found = first_true(rows.mask.to(torch.float32))
        return self.marked(picked(value, rows.axis, place), Rows(found, rows.axis, first=True))

    def settled(self, values: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[tuple[int, int] | None]]:
        """Results of fixed size, and how many of their rows count.

        Returns:
            Each value with zeros in the rows behind those that count; int64 counts ``[1]``, one a choice; and for each
            value the place of its count and the axis of its rows, None where all rows count.
        """
        found: list[Tensor] = []
        counts: list[Tensor] = []
        which: list[tuple[int, int] | None] = []
        known: dict[int, int] = {}
        for value in values:
            rows = self.rows(value)
            if rows is None:
                found.append(value)
                which.append(None)
                continue
            if id(rows.mask) not in known:
                known[id(rows.mask)] = len(counts)
                counts.append(torch.sum(rows.mask.to(torch.int64), 0, keepdim=True))
            which.append((known[id(rows.mask)], rows.axis))
            found.append(self.emptied(self.in_front(value)))
        return found, counts, which

    def remarks(self) -> list[str]:
        """What the report says of suppressions that were given more boxes than they look at."""
        return looked_at(self.given, self.candidates)

    def emptied(self, value: Tensor) -> Tensor:
        """``value`` with zeros (False) in the rows that do not count. Any shape."""
        rows = self.rows(value)
        return value if rows is None else torch.where(spread(rows, value.dim()), value, nothing(value))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._rests:
            return func(*args, **kwargs)
        name = plain_name(func)
        if name in ALWAYS:
            return RULES[name](self, func, args, kwargs)
        if not any(True for _ in self.marked_in((args, kwargs))):
            return func(*args, **kwargs)
        if name in RULES:
            return RULES[name](self, func, args, kwargs)
        result = func(*args, **kwargs)
        if any(isinstance(item, Tensor) for item in leaves_of(result)):
            raise self.refused(func)
        return result

    def marked_in(self, values: Any) -> Iterator[Tensor]:
        """The tensors in nested values of which not all rows count."""
        for item in leaves_of(values):
            if isinstance(item, Tensor) and item in self._rows:
                yield item

    def refused(self, func: Callable[..., Any], reason: str = "") -> OpenSizeError:
        """The error for a function that would mix rows that count with others; raise it."""
        what = reason or "takes rows that values chose, and it is not known which of its rows count then"
        return OpenSizeError(f"{plain_name(func)} {what}")


def count_names(names: Sequence[str], which: Sequence[tuple[int, int] | None]) -> list[str]:
    """Names for the counts of results: ``count`` for one alone, else after the first result that each counts.

    Args:
        names: of the results. which: for each the place of its count, see `ChosenRows.settled`.
    """
    firsts: dict[int, str] = {}
    for name, found in zip(names, which, strict=True):
        if found is not None:
            firsts.setdefault(found[0], name)
    if len(firsts) == 1 and "count" not in names:
        return ["count"]
    return [f"{firsts[place]}_count" for place in sorted(firsts)]


# Functions with a rule of their own even where all rows count: they choose rows.
ALWAYS: set[str] = set()


def plain_name(func: Any) -> str:
    """``add`` for ``Tensor.__add__``, ``add_`` and ``torch.add`` alike; of properties theirs."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(func.__self__, "__name__", "")
    return str(name).split(".")[0].strip("_")


def picked(value: Tensor, axis: int, places: Tensor) -> Tensor:
    """``index_select``, of booleans by way of numbers: Core ML chooses among no booleans.

    [..., N, ...] -> [..., K, ...] along ``axis``.
    """
    if value.dtype != torch.bool:
        return torch.index_select(value, axis, places)
    return torch.gt(torch.index_select(value.to(torch.float32), axis, places), 0.5)


def spread(rows: Rows, rank: int) -> Tensor:
    """The mask beside a tensor of ``rank`` axes: ``[N] -> [1, N, 1, ...]``."""
    shape = [1] * rank
    shape[rows.axis] = rows.mask.shape[0]
    return torch.reshape(rows.mask, shape)


def nothing(value: Tensor) -> Tensor:
    """Zero in the dtype of a tensor, with one element for each of its axes."""
    return torch.zeros([1] * value.dim(), dtype=value.dtype)
