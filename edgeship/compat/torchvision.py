"""What edgeship takes from torchvision that torchvision does not document. Written for torchvision 0.24 to 0.29.

``batched_nms`` chooses between two ways to keep classes apart by how many boxes there are, and one of them loops over
the classes that it finds; an export has neither number. This ends when torchvision has an operator for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from edgeship.compat.exchange import exchanged

__all__ = ["class_wise", "one_by_one"]

# The two ways, functions of ``torchvision.ops.boxes``: (boxes, scores, classes, threshold) -> places. The second one
# suppresses class by class.
_WAYS = ("_batched_nms_coordinate_trick", "_batched_nms_vanilla")


@contextmanager
def class_wise(function: Callable[..., Any]) -> Iterator[None]:
    """Inside, ``torchvision.ops.batched_nms`` calls ``function`` for both; nothing without torchvision."""
    boxes: Any = sys.modules.get("torchvision.ops.boxes")
    with ExitStack() as stack:
        for name in _WAYS if boxes is not None else ():
            stack.enter_context(exchanged(boxes, name, function))
        yield


@contextmanager
def one_by_one() -> Iterator[None]:
    """Inside, ``batched_nms`` suppresses each class by itself however few boxes there are: moved apart by an offset,
    their shares are rounded otherwise."""
    boxes: Any = sys.modules.get("torchvision.ops.boxes")
    with exchanged(boxes, _WAYS[0], getattr(boxes, _WAYS[1])) if boxes is not None else ExitStack():
        yield
