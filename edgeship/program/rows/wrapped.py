"""A module whose forward chooses rows by values, as one whose results have fixed sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from edgeship.compat.torch import leaves_of, operator_named
from edgeship.compat.torchvision import class_wise, one_by_one
from edgeship.program.rows.mode import ChosenRows, plain_name
from edgeship.program.rows.order import in_order
from edgeship.program.rows.ranking import suppressed

Tensor = torch.Tensor


@dataclass
class Told:
    """What is known of a module once it ran.

    Args:
        counts: for each result the place of the count of its rows and the axis that they lie on, None where all count.
        given: how many boxes each suppression was given.
    """

    counts: list[tuple[int, int] | None] = field(default_factory=list)
    given: list[int] = field(default_factory=list)

    @property
    def number(self) -> int:
        """How many counts follow the results."""
        return max((found[0] + 1 for found in self.counts if found is not None), default=0)


class FixedRows(torch.nn.Module):
    """Results of fixed size, flat: rows that count first, zeros behind them, and after the results their counts.

    Args:
        model: kept under this name. answer: how it is called, with tensors by position.
        candidates: how many boxes go into one suppression.
    """

    def __init__(self, model: torch.nn.Module, answer: Callable[..., Any], candidates: int) -> None:
        super().__init__()
        self.model = model
        self.told = Told()
        self._answer = answer
        self._candidates = candidates

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Inputs by position; see the class for what comes back."""
        mode = ChosenRows(self._candidates)

        def by_class(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
            """Boxes ``[N, 4]``, scores and classes ``[N]``; places ``[K]``."""
            return suppressed(mode, boxes, scores, threshold, classes)

        with class_wise(by_class), mode:
            result = self._answer(*tensors)
        found, counts, which = mode.settled([leaf for leaf in leaves_of(result) if isinstance(leaf, Tensor)])
        self.told.counts, self.told.given = which, mode.given
        return (*found, *counts)


class _InOrder(TorchFunctionMode):
    """Of equal elements the first comes first, as engines have it; torch's ``topk`` and ``sort`` promise nothing."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return in_order(func, args, kwargs or {})


class _Asking(TorchFunctionMode):
    """Notes whether ``torchvision.ops.nms`` is called."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: bool = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.asked = self.asked or plain_name(func) == "nms"
        return func(*args, **(kwargs or {}))


def suppresses(wrapper: torch.nn.Module, examples: Sequence[Tensor]) -> bool:
    """Whether a module calls a suppression on these inputs: no trace of it as it is can have fixed sizes.

    ``examples`` have the shapes of the inputs.
    """
    if operator_named("torchvision::nms") is None:
        return False
    with torch.no_grad(), _Asking() as asking:
        wrapper(*(example.clone() for example in examples))
    return bool(asking.asked)


@contextmanager
def as_engines_order() -> Iterator[None]:
    """Inside, a module answers as it does, with equal scores in their order and classes kept apart one by one."""
    with one_by_one(), _InOrder():
        yield
