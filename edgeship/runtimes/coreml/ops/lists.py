"""Lists of tensors of one shape, as loops build them. A write gives a new list."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgeship.errors import ArtifactError, DataError
from edgeship.runtimes.coreml.ops.registry import TORCH_DTYPES, Call, ListValue, op

if TYPE_CHECKING:
    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs


def _list(call: Call) -> ListValue:
    value = call.value("ls")
    if not isinstance(value, ListValue):
        raise ArtifactError(f"{call.operation.label}: ls is not a list", fix="build the package again")
    return value


def _written(call: Call, values: list[tuple[int, Tensor]]) -> ListValue:
    """The list with some items replaced, each of any shape."""
    items = list(_list(call).items)
    for index, tensor in values:
        if index < 0 or (index >= len(items) and not _list(call).dynamic):
            raise DataError(f"{call.operation.label}: index {index} of a list of {len(items)}", fix="check the inputs")
        items += [None] * (index + 1 - len(items))
        items[index] = tensor
    return ListValue(items, _list(call).dynamic, _list(call).element)


def _read(call: Call, index: int) -> Tensor:
    """One item, of any shape; zeros where nothing was written."""
    items, element = _list(call).items, _list(call).element
    if not 0 <= index < len(items):
        raise DataError(f"{call.operation.label}: index {index} of a list of {len(items)}", fix="check the inputs")
    written = items[index]
    if written is not None:
        return written
    like = next((item for item in items if item is not None), None)
    shape = element.shape if like is None else like.shape
    if None in shape:
        raise DataError(f"{call.operation.label}: nothing was written, and the shape is open", fix="check the inputs")
    return torch.zeros([size or 0 for size in shape], dtype=TORCH_DTYPES[element.dtype])


@op("make_list")
def make_list(call: Call) -> Outputs:
    """An empty list of ``init_length`` places."""
    places: list[Tensor | None] = [None] * call.integer("init_length", 1)
    return ListValue(places, call.flag("dynamic_length", True), call.outputs[0].type)


@op("list_length")
def list_length(call: Call) -> Outputs:
    """Its number of places."""
    return torch.tensor(len(_list(call).items))


@op("list_read")
def list_read(call: Call) -> Outputs:
    """The tensor at ``index``; zeros where nothing was written."""
    return _read(call, call.integer("index"))


@op("list_gather")
def list_gather(call: Call) -> Outputs:
    """The tensors at ``indices``, stacked."""
    return torch.stack([_read(call, index) for index in call.integers("indices")])


@op("list_write")
def list_write(call: Call) -> Outputs:
    """With ``value`` at ``index``, longer if need be."""
    return _written(call, [(call.integer("index"), call.data("value"))])


@op("list_scatter")
def list_scatter(call: Call) -> Outputs:
    """With row i of ``value`` at ``indices[i]``."""
    return _written(call, list(zip(call.integers("indices"), call.data("value"), strict=True)))
