"""Functions that choose rows by a mask or by places, and what a tensor says of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from edgeship.program.rows.carrying import by_element, together
from edgeship.program.rows.mode import ALWAYS, ChosenRows, Rows, picked, plain_name, rule, spread

Tensor = torch.Tensor
Kwargs = dict[str, Any]
Function = Callable[..., Any]

ALWAYS |= {"getitem", "setitem", "where", "nonzero", "argwhere", "shape_as_tensor"}


@rule("where")
def where(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """With one argument the places where it holds; with three a choice element by element."""
    if len(args) + len(kwargs) == 1 and not mode.is_known(args[0] if args else kwargs["condition"]):
        return places_of(mode, args[0] if args else kwargs["condition"])
    if not any(True for _ in mode.marked_in((args, kwargs))):
        return func(*args, **kwargs)
    return by_element(mode, func, args, kwargs)


@rule("nonzero", "argwhere")
def nonzero(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """Places that are not 0, by axis, or in rows ``[N, axes]``."""
    x = args[0]
    if mode.is_known(x):
        return func(*args, **kwargs)
    found = places_of(mode, x if x.dtype == torch.bool else torch.ne(x, 0))
    if kwargs.get("as_tuple"):
        return found
    rows = mode.rows(found[0])
    assert rows is not None
    return mode.marked(torch.stack(found, 1), dataclasses.replace(rows, places=False))


def places_of(mode: ChosenRows, condition: Tensor) -> tuple[Tensor, ...]:
    """For each axis the places where a condition holds, all places in their order, ``[N]`` each."""
    mask = flat_mask(mode, condition, condition.dim())
    # Known at run time only, as far as it counts: no constant, though all of it is there.
    place = torch.where(mask, torch.arange(mask.shape[0]), torch.zeros((1,), dtype=torch.int64))
    if condition.dim() == 1:
        return (mode.marked(place, Rows(mask, places=True)),)
    found: list[Tensor] = []
    for axis in range(condition.dim()):
        stride = 1
        for size in condition.shape[axis + 1 :]:
            stride *= size
        index = torch.remainder(torch.div(place, stride, rounding_mode="floor"), condition.shape[axis])
        found.append(mode.marked(index, Rows(mask)))
    return tuple(found)


def flat_mask(mode: ChosenRows, condition: Tensor, rank: int) -> Tensor:
    """A condition on the first ``rank`` axes as one mask, without rows that did not count before. ``[N]``."""
    rows = mode.rows(condition)
    own = condition if condition.dtype == torch.bool else torch.ne(condition, 0)
    if rows is None:
        return own if rank == 1 else mode.made(("flat",), (condition,), lambda: torch.reshape(own, (-1,)))
    if rank == 1:
        return mode.both(rows.mask, own)
    joint = lambda: torch.reshape(torch.logical_and(own, spread(rows, rank)), (-1,))  # noqa: E731
    return mode.made(("flat",), (condition,), joint)


@rule("getitem")
def getitem(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """``x[key]``: a mask or places that values chose, or a plain key on rows that they chose."""
    x, key = args
    parts = list(key) if isinstance(key, tuple) else [key]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    masks = [part for part in tensors if part.dtype == torch.bool and part.dim()]
    if not masks and not any(True for _ in mode.marked_in((x, parts))):
        return func(x, key)
    if masks and all(map(mode.is_known, masks)) and not any(True for _ in mode.marked_in((x, parts))):
        return func(x, key)
    if isinstance(key, list):
        parts = [torch.tensor(key)]
        tensors = parts
    if not tensors:
        return _plainly(mode, func, x, parts)
    if len(tensors) == 1 and isinstance(parts[0], Tensor):
        chosen = _by_mask(mode, x, parts[0]) if masks else _by_places(mode, func, x, parts[0])
        return chosen if len(parts) == 1 else getitem(mode, func, (chosen, (slice(None), *parts[1:])), {})
    if masks:
        raise mode.refused(func, "takes a mask beside other indices")
    return _by_pairs(mode, func, x, parts)


def _by_mask(mode: ChosenRows, x: Tensor, mask: Tensor) -> Tensor:
    """``[N, ...] -> [N, ...]``, axes that the mask covers joined."""
    rank = mask.dim()
    own = flat_mask(mode, mask, rank)
    rows = mode.rows(x)
    if rows is not None:
        if rows.axis >= rank:
            raise mode.refused(torch.masked_select, "chooses among rows that values chose")
        if mode.rows(mask) is None:
            wide = lambda: torch.reshape(spread(rows, rank).expand(mask.shape), (-1,))  # noqa: E731
            own = mode.both(own, rows.mask if rank == 1 else mode.made(("wide", tuple(mask.shape)), (rows.mask,), wide))
    flat = x if rank == 1 else torch.reshape(x, (-1, *x.shape[rank:]))
    # A view of its own, so that x keeps its rows.
    return mode.marked(flat.view_as(flat) if flat is x else flat, Rows(own))


def _by_places(mode: ChosenRows, func: Function, x: Tensor, places: Tensor) -> Tensor:
    """``[N, ...]`` by ``[K] -> [K, ...]``; rows count as the places do."""
    chosen, rows = mode.rows(places), mode.rows(x)
    if rows is not None and rows.axis:
        raise mode.refused(func, "chooses among others than the rows that values chose")
    if chosen is None:
        assert rows is not None
        front = mode.in_front(x)
        counted = mode.rows(front)
        assert counted is not None
        return mode.marked(func(front, places), Rows(picked(counted.mask, 0, places)) if places.dim() == 1 else None)
    if places.dim() != 1:
        return mode.marked(func(x, places), dataclasses.replace(chosen, places=False))
    if chosen.places and x.shape[0] == places.shape[0]:
        return mode.marked(x.view_as(x), dataclasses.replace(chosen, places=False))
    return mode.marked(picked(x, 0, places), dataclasses.replace(chosen, places=False))


def _by_pairs(mode: ChosenRows, func: Function, x: Tensor, parts: list[Any]) -> Tensor:
    """Indices for several axes at once, chosen together; what they choose comes first."""
    places = [place for place, part in enumerate(parts) if isinstance(part, Tensor)]
    tensors = [parts[place] for place in places]
    found = [rows for rows in map(mode.rows, tensors) if rows is not None]
    whole = mode.rows(x)
    alike = bool(found) and all(rows.mask is found[0].mask for rows in found)
    inside = whole is None or (whole.axis == places[0] and found and mode.rows(tensors[0]) is not None)
    if not alike or not inside or any(tensor.dim() > 1 for tensor in tensors):
        raise mode.refused(func, "takes indices that were chosen apart")
    result = func(x, tuple(parts))
    adjacent = places == list(range(places[0], places[0] + len(places)))
    axis = places[0] if adjacent else 0
    if any(part is None or part is Ellipsis or isinstance(part, int) for part in parts[: places[0]]):
        raise mode.refused(func, "takes indices behind a new axis")
    return mode.marked(result, Rows(found[0].mask, axis, found[0].first))


def _plainly(mode: ChosenRows, func: Function, x: Tensor, parts: list[Any]) -> Tensor:
    """Slices, numbers and new axes on rows that values chose."""
    rows = mode.rows(x)
    assert rows is not None
    used = sum(1 for part in parts if part is not None and part is not Ellipsis)
    if Ellipsis not in parts:
        parts = [*parts, Ellipsis]
    at = parts.index(Ellipsis)
    whole = [*parts[:at], *[slice(None)] * (x.dim() - used), *parts[at + 1 :]]
    axis, made, key = 0, 0, None
    for part in whole:
        if part is None:
            made += 1
            continue
        if axis == rows.axis:
            key = part
            break
        made += not isinstance(part, int)
        axis += 1
    if key == slice(None):
        return mode.marked(func(x, tuple(whole)), dataclasses.replace(rows, axis=made, places=False))
    if not isinstance(key, slice):
        raise mode.refused(func, "takes one row of those that values chose")
    front = mode.in_front(x)
    counted = mode.rows(front)
    assert counted is not None
    if key.step not in (None, 1) or (key.start or 0) < 0 or (key.stop is not None and key.stop < 0):
        raise mode.refused(func, "counts rows that values chose from their end")
    start, stop, _ = key.indices(counted.mask.shape[0])
    mask = mode.made(("slice", start, stop), (counted.mask,), lambda: counted.mask[start:stop])
    return mode.marked(func(front, tuple(whole)), Rows(mask, made, first=True))


@rule("select", "narrow")
def cut_out(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """``select`` and ``narrow`` as what they are in brackets."""
    x, whole = args[0], plain_name(func) == "narrow"
    names = ("dim", "start", "length") if whole else ("dim", "index")
    said = {**dict(zip(names, args[1:], strict=False)), **kwargs}
    dim = said["dim"]
    key = slice(said["start"], said["start"] + said["length"]) if whole else said["index"]
    return _plainly(mode, torch.Tensor.__getitem__, x, [*[slice(None)] * (dim % x.dim()), key])


@rule("setitem")
def setitem(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """``x[key] = value`` where values chose the rows of the key: the others stay what they are."""
    x, key, value = args
    if not any(True for _ in mode.marked_in((x, key, value))):
        return func(x, key, value)
    rows = mode.rows(key) if isinstance(key, Tensor) else None
    if isinstance(key, Tensor) and key.dtype == torch.bool and key.dim() == 1:
        rows = Rows(flat_mask(mode, key, 1), places=True)
    if rows is None or not rows.places or mode.rows(x) is not None:
        raise mode.refused(func, "writes rows that values chose")
    other = mode.rows(value)
    if other is not None and (other.axis or other.mask is not rows.mask):
        raise mode.refused(func, "writes rows that were chosen apart")
    given = value.to(x.dtype) if isinstance(value, Tensor) else torch.full([1] * x.dim(), value, dtype=x.dtype)
    x.copy_(torch.where(spread(Rows(rows.mask), x.dim()), given, x))
    return None


@rule("index_select")
def index_select(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """As ``x[places]`` along one axis."""
    x, dim, places = args
    if dim % x.dim() == 0:
        return _by_places(mode, torch.Tensor.__getitem__, x, places)
    chosen, rows = mode.rows(places), mode.rows(x)
    if chosen is not None and rows is not None:
        raise mode.refused(func)
    result = func(*args, **kwargs)
    if rows is not None:
        return mode.marked(result, dataclasses.replace(rows, places=False))
    assert chosen is not None
    return mode.marked(result, dataclasses.replace(chosen, axis=dim % x.dim(), places=False))


@rule("gather", "take_along_dim")
def gather(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """One place for each element, along another axis than that of the rows."""
    x, dim, index = args[0], kwargs.get("dim", args[1]), kwargs.get("index", args[-1])
    rows = together(mode, func, [x, index], x.dim())
    if rows.axis == dim % x.dim():
        raise mode.refused(func)
    return mode.marked(func(*args, **kwargs), rows)


@rule(
    "shape", "size", "dim", "ndim", "dtype", "device", "numel", "len", "is_floating_point", "is_cuda", "layout",
    "requires_grad", "element_size", "stride", "is_contiguous", "is_sparse", "is_quantized", "get_device", "nelement",
    "is_complex", "storage_offset", "is_nested", "is_mps", "is_meta", "itemsize", "nbytes", "is_xla", "names",
)  # fmt: skip
def asked(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """What a tensor is: it has all of its rows."""
    return func(*args, **kwargs)


@rule("shape_as_tensor")
def shape_as_tensor(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """Sizes as a tensor ``[axes]``: they are fixed here, and torch's own reads memory that a trace has not."""
    return torch.tensor([int(size) for size in args[0].shape])
