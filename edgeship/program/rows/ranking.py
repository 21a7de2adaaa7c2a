"""Functions that order rows that values chose, keep the best, or make one value of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from edgeship.program.rows.carrying import by_element
from edgeship.program.rows.mode import ALWAYS, ChosenRows, Rows, nothing, picked, plain_name, rule, spread
from edgeship.program.rows.order import in_order
from edgeship.program.suppression import LOWEST, suppress

Tensor = torch.Tensor
Kwargs = dict[str, Any]
Function = Callable[..., Any]

ALWAYS |= {"nms", "topk", "sort", "argsort"}


@rule("topk", "sort", "argsort")
def best(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """The best rows of those that count, best first; along another axis, row by row."""
    x, rows = args[0], mode.rows(args[0])
    if rows is None:
        return func(*args, **kwargs) if mode.is_known(x) else in_order(func, args, kwargs)
    name = plain_name(func)
    place = 2 if name == "topk" else 1
    dim = kwargs.get("dim", args[place] if len(args) > place else -1)
    largest = kwargs.get("largest", args[3] if len(args) > 3 else True)
    if name != "topk":
        largest = kwargs.get("descending", args[2] if len(args) > 2 else False)
    if dim % x.dim() != rows.axis:
        result = in_order(func, args, kwargs)
        for part in [result] if isinstance(result, Tensor) else result:
            mode.marked(part, dataclasses.replace(rows, places=False))
        return result
    if x.dim() != 1 or not x.is_floating_point():
        raise mode.refused(func, "orders rows that values chose by more than one number each")
    ranked = torch.where(rows.mask, x if largest else -x, torch.full((1,), LOWEST))
    values, order = torch.sort(ranked, stable=True, dim=0, descending=True)
    count = x.shape[0]
    if name == "topk":
        count = min(int(kwargs["k"] if "k" in kwargs else args[1]), count)
    values, order = torch.narrow(values, 0, 0, count), torch.narrow(order, 0, 0, count)
    counted = Rows(picked(rows.mask, 0, order), first=True)
    mode.marked(order, counted)
    if name == "argsort":
        return order
    found = torch.return_types.topk if name == "topk" else torch.return_types.sort
    return found((mode.marked(values if largest else -values, counted), order))


@rule("nms")
def nms(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """``torchvision.ops.nms``."""
    given = dict(zip(("boxes", "scores", "iou_threshold"), args, strict=False))
    given = {**given, **{{"dets": "boxes"}.get(name, name): value for name, value in kwargs.items()}}
    return suppressed(mode, given["boxes"], given["scores"], given["iou_threshold"])


def suppressed(
    mode: ChosenRows, boxes: Tensor, scores: Tensor, threshold: float, classes: Tensor | None = None
) -> Tensor:
    """What a suppression keeps, best first, as places; rows that count first. ``[K]``."""
    found = [rows for rows in map(mode.rows, (boxes, scores)) if rows is not None]
    if len({id(rows.mask) for rows in found}) > 1 or any(rows.axis for rows in found):
        raise mode.refused(suppressed, "takes boxes and scores that were chosen apart")
    mask = found[0].mask if found else None
    mode.given.append(scores.shape[0])
    with mode.at_rest():
        kept = suppress(boxes, scores, threshold, valid=mask, classes=classes, candidates=mode.candidates)
    return mode.marked(kept.index, Rows(kept.valid, first=True))


@rule("max", "amax", "min", "amin", "sum", "any", "all", "mean", "argmax", "argmin", "prod")
def reduced(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """Over rows that values chose only those that count; along another axis, row by row."""
    x, rows = args[0], mode.rows(args[0])
    dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
    if isinstance(dims, Tensor):
        return by_element(mode, func, args, kwargs)
    assert rows is not None
    given = [dims] if isinstance(dims, int) else dims
    axes = [axis % x.dim() for axis in (range(x.dim()) if given is None else given)]
    if rows.axis not in axes:
        kept = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
        axis = rows.axis if kept else rows.axis - sum(1 for item in axes if item < rows.axis)
        result = func(*args, **kwargs)
        for part in [result] if isinstance(result, Tensor) else result:
            mode.marked(part, dataclasses.replace(rows, axis=axis, places=False))
        return result
    return _over_rows(mode, func, x, axes, args, kwargs)


# What a row that does not count is for each function, so that it changes nothing.
FILLS = {"sum": 0, "mean": 0, "any": 0, "all": 1, "prod": 1, "max": LOWEST, "amax": LOWEST, "argmax": LOWEST,
    "min": -LOWEST, "amin": -LOWEST, "argmin": -LOWEST}  # fmt: skip


def _over_rows(
    mode: ChosenRows, func: Function, x: Tensor, axes: Sequence[int], args: Sequence[Any], kwargs: Kwargs
) -> Any:
    """A reduction over ``axes`` of which one is that of the rows. ``[..., N, ...] -> [...]``."""
    name, fill = plain_name(func), FILLS[plain_name(func)]
    if name[-3:] in ("max", "min"):
        if not x.is_floating_point():
            raise mode.refused(func, "is taken over integers that values chose")
        if name in ("argmax", "argmin") and len(axes) > 1 and x.dim() > 1:
            raise mode.refused(func, "tells a place among all elements of rows that values chose")
        # A place among those that count is one among all only where they come first.
        x = mode.in_front(x)
    rows = mode.rows(x)
    assert rows is not None
    other = nothing(x) if not fill else torch.full([1] * x.dim(), fill, dtype=x.dtype)
    filled = torch.where(spread(rows, x.dim()), x, other)
    if name != "mean":
        return func(filled, *args[1:], **kwargs)
    each = 1
    for axis in axes:
        each *= 1 if axis == rows.axis else x.shape[axis]
    number = torch.sum(rows.mask.to(filled.dtype)) * each
    return torch.sum(filled, *(args[1:] or ()), **kwargs) / number


@rule("pad")
def pad(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """Filled up to a fixed number of rows, what does not count is part of the filling, and all rows count."""
    x, rows = args[0], mode.rows(args[0])
    assert rows is not None
    widths = list(kwargs.get("pad", args[1] if len(args) > 1 else ()))
    fill = kwargs.get("value", args[3] if len(args) > 3 else 0) or 0
    behind = 2 * (x.dim() - 1 - rows.axis)
    # What is filled on other axes alone leaves the rows; what is filled by nothing at all was short of nothing here.
    if len(widths) <= behind or (any(widths) and not any(widths[behind : behind + 2])):
        return mode.marked(func(*args, **kwargs), dataclasses.replace(rows, places=False))
    if widths[behind] or kwargs.get("mode", args[2] if len(args) > 2 else "constant") != "constant":
        raise mode.refused(func)
    front = mode.in_front(x)
    counted = mode.rows(front)
    assert counted is not None
    filled = torch.where(spread(counted, x.dim()), front, torch.full([1] * x.dim(), fill, dtype=x.dtype))
    return func(filled, *args[1:], **kwargs)


@rule("roi_align", "roi_pool", "ps_roi_align")
def regions(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """One result for each region."""
    rows = mode.rows(args[1])
    if rows is None or mode.rows(args[0]) is not None:
        raise mode.refused(func)
    return mode.marked(func(*args, **kwargs), dataclasses.replace(rows, places=False))
