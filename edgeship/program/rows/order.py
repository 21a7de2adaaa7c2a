"""Order among equal elements: engines keep it, torch's ``topk`` and ``sort`` promise nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from edgeship.program.rows.mode import plain_name


def in_order(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What ``topk``, ``sort`` and ``argsort`` give with equal elements in their order; other functions as they are."""
    name = plain_name(func)
    if name not in ("topk", "sort", "argsort") or not args[0].is_floating_point():
        return func(*args, **kwargs)
    x = args[0]
    place = 2 if name == "topk" else 1
    dim = kwargs.get("dim", args[place] if len(args) > place else -1)
    falling = kwargs.get("descending", args[2] if len(args) > 2 else False)
    if name == "topk":
        falling = kwargs.get("largest", args[3] if len(args) > 3 else True)
    values, order = torch.sort(x, stable=True, dim=dim, descending=bool(falling))
    if name == "topk":
        count = int(kwargs.get("k", args[1] if len(args) > 1 else 0))
        return torch.return_types.topk((torch.narrow(values, dim, 0, count), torch.narrow(order, dim, 0, count)))
    return order if name == "argsort" else torch.return_types.sort((values, order))
