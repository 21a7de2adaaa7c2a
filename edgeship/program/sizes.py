"""Sizes are reckoned before they are allocated: a graph may ask for a tensor that no machine holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgeship.core.units import human_bytes
from edgeship.errors import LimitError

if TYPE_CHECKING:
    import torch

# One tensor; protobuf and flatbuffers, which artifacts are made of, end at 2 GB as well.
MAX_TENSOR_BYTES = 2**31
# Below this no operator needs a look: what it could make at most is small.
_HARMLESS_BYTES = 2**28


@contextmanager
def guarded_sizes(where: str = "the model") -> Iterator[None]:
    """While active, an operator that would make a tensor of more than `MAX_TENSOR_BYTES` is refused before it runs.

    Args:
        where: what runs, for the message.

    Raises:
        LimitError: with the operator and the shape.
    """
    with _guard(where):
        yield


def _guard(where: str) -> Any:
    import torch

    from edgeship.compat.torch import (
        FakeTensor,
        FakeTensorMode,
        TorchDispatchMode,
        is_operator,
        is_view,
        leaves_of,
        map_tensors,
    )

    def reckoned(function: Any, args: Any, kwargs: Any) -> None:
        """Run an operator on tensors without numbers; raise when one of its results is too large."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            with mode:
                fake_args, fake_kwargs = map_tensors(
                    lambda item: item if isinstance(item, FakeTensor) else mode.from_tensor(item), (args, kwargs)
                )
                results = leaves_of(function(*fake_args, **fake_kwargs))
        except Exception:
            return  # its size depends on its numbers, or it fails: it says so itself when it runs
        for result in results:
            if isinstance(result, torch.Tensor):
                check_tensor_size(result, f"{function} in {where}")

    class Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
        supports_higher_order_operators = True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if is_operator(func) and _at_most(args, kwargs) > _HARMLESS_BYTES and not is_view(func):
                reckoned(func, args, kwargs)
            return func(*args, **kwargs)

    return Guard()  # type: ignore[no-untyped-call]


def check_tensor_size(tensor: torch.Tensor, what: str) -> None:
    """Raise `LimitError` when a tensor (which need not have numbers) is larger than any artifact could hold.

    Any shape.
    """
    size = math.prod(int(item) for item in tensor.shape) * tensor.element_size()
    if size > MAX_TENSOR_BYTES:
        raise LimitError(
            f"{what} makes a tensor of shape {list(tensor.shape)}, {human_bytes(size)}", fix="give smaller inputs"
        )


def _at_most(args: Any, kwargs: Any) -> int:
    """Bytes that a result can have at most: the product of what goes in, as numbers are sizes and tensors multiply."""
    import torch

    numbers, largest = 1, []
    pending: list[Any] = [*args, *kwargs.values()]
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            largest.append(max(1, item.numel()) * item.element_size())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
        elif isinstance(item, (int, float)) and not isinstance(item, bool) and abs(item) > 1:
            numbers *= int(min(abs(item), 2**40))
            if numbers > 2**80:
                return numbers
    largest.sort(reverse=True)
    # Without a tensor, one number may be two sizes: torch.eye.
    return numbers * math.prod(largest[:2]) if largest else 8 * numbers**2
