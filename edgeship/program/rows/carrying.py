"""Functions that work row by row: which rows count stays as it is, on the axis where the rows are afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from edgeship.program.rows.mode import ChosenRows, Rows, plain_name, rule

Tensor = torch.Tensor
Kwargs = dict[str, Any]
Function = Callable[..., Any]


@rule(
    "abs", "acos", "add", "and", "asin", "atan", "atan2", "bitwise_and", "bitwise_or", "bool", "ceil", "celu", "clamp",
    "clamp_max", "clamp_min", "clip", "clone", "contiguous", "copy", "cos", "cpu", "detach", "div", "double", "dropout",
    "elu", "empty_like", "eq", "erf", "exp", "expm1", "fill", "float", "floor", "floor_divide", "fmod", "full_like",
    "ge", "gelu", "gt", "half", "hardsigmoid", "hardswish", "hardtanh", "iadd", "idiv", "imul", "int", "invert",
    "isfinite", "isinf", "isnan", "isub", "itruediv", "le", "leaky_relu", "log", "log10", "log1p", "log2",
    "logical_and", "logical_not", "logical_or", "logical_xor", "long", "lt", "maximum", "minimum", "mish", "mul",
    "nan_to_num", "ne", "neg", "ones_like", "or", "pow", "prelu", "radd", "rdiv", "reciprocal", "relu", "relu6",
    "remainder", "rmul", "round", "rpow", "rsqrt", "rsub", "rtruediv", "sigmoid", "sign", "silu", "sin", "softplus",
    "sqrt", "square", "sub", "subtract", "tan", "tanh", "to", "true_divide", "truediv", "trunc", "type", "type_as",
    "xor", "zeros_like", "masked_fill", "multiply", "divide", "greater", "less", "greater_equal", "less_equal",
)  # fmt: skip
def by_element(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """Element by element: the axes of all go together from the last on."""
    result = func(*args, **kwargs)
    if not isinstance(result, Tensor):
        return result
    return mode.marked(result, together(mode, func, [*args, *kwargs.values()], result.dim()))


def together(mode: ChosenRows, func: Function, values: Sequence[Any], rank: int) -> Rows:
    """The rows that values of one result share, on its axis. Raises `OpenSizeError` where they were chosen apart."""
    found: Rows | None = None
    for value in mode.marked_in(values):
        rows = mode.rows(value)
        assert rows is not None
        axis = rows.axis + rank - value.dim()
        if found is not None and (found.axis != axis or found.mask is not rows.mask):
            raise mode.refused(func, "pairs rows that were chosen apart")
        found = dataclasses.replace(rows, axis=axis, places=False)
    assert found is not None
    return found


@rule(
    "linear", "conv1d", "conv2d", "conv3d", "batch_norm", "group_norm", "instance_norm", "max_pool2d", "avg_pool2d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "conv_transpose2d", "boolean_dispatch", "layer_norm",
    "max_pool1d", "avg_pool1d", "pixel_shuffle", "upsample", "grid_sample", "embedding", "addmm", "mm", "matmul",
)  # fmt: skip
def of_a_batch(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """Layers: rows are the batch, which stays in front."""
    result = func(*args, **kwargs)
    marked = list(mode.marked_in([*args, *kwargs.values()]))
    rows = mode.rows(marked[0])
    assert rows is not None
    first = kwargs.get("input", args[0] if args else None)
    if len(marked) > 1 or marked[0] is not first or rows.axis or marked[0].dim() < 2:
        raise mode.refused(func)
    return mode.marked(result, rows)


@rule("softmax", "log_softmax", "normalize", "cumsum", "cumprod", "flip")
def along_others(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """Along one axis, which must not be that of the rows."""
    x = args[0]
    rows = mode.rows(x)
    dims = kwargs.get("dim", kwargs.get("dims", args[1] if len(args) > 1 else None))
    axes = [dims] if isinstance(dims, int) else list(dims or ())
    if rows is None or not axes or rows.axis in [axis % x.dim() for axis in axes]:
        raise mode.refused(func)
    return mode.marked(func(*args, **kwargs), dataclasses.replace(rows, places=False))


@rule("unsqueeze")
def unsqueeze(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """An axis more."""
    x, rows = args[0], mode.rows(args[0])
    assert rows is not None
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % (x.dim() + 1)
    return mode.marked(
        func(*args, **kwargs), dataclasses.replace(rows, axis=rows.axis + (dim <= rows.axis), places=False)
    )


@rule("squeeze")
def squeeze(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """An axis of one element less; never that of the rows, which may be one."""
    x, rows = args[0], mode.rows(args[0])
    assert rows is not None
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if isinstance(dims, int):
        dims = [dims]
    axes = range(x.dim()) if dims is None else dims
    gone = [axis % x.dim() for axis in axes if x.shape[axis] == 1]
    if rows.axis in gone:
        raise mode.refused(func)
    before = sum(1 for axis in gone if axis < rows.axis)
    return mode.marked(func(*args, **kwargs), dataclasses.replace(rows, axis=rows.axis - before, places=False))


@rule("permute", "transpose", "t", "T", "mT", "swapaxes", "movedim")
def permute(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """Axes in another order, found by moving the numbers of the axes themselves."""
    x, rows = args[0], mode.rows(args[0])
    assert rows is not None
    result = func(*args, **kwargs)
    # Sizes that tell the axes apart, on a tensor that holds nothing.
    probe = torch.empty(tuple(range(1, x.dim() + 1)), device="meta")
    axis = list(func(probe, *args[1:], **kwargs).shape).index(rows.axis + 1)
    return mode.marked(result, dataclasses.replace(rows, axis=axis, places=False))


@rule("reshape", "view", "flatten", "unflatten", "view_as", "reshape_as", "ravel")
def reshape(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """Rows stay an axis, or are joined with the axes behind it: then each part of a row counts as it does."""
    x, rows = args[0], mode.rows(args[0])
    assert rows is not None
    result = func(*args, **kwargs)
    before, size = _count(x.shape[: rows.axis]), x.shape[rows.axis]
    behind = _count(x.shape[rows.axis + 1 :])
    for axis in range(result.dim()):
        if _count(result.shape[:axis]) != before:
            continue
        if result.shape[axis] == size:
            return mode.marked(result, dataclasses.replace(rows, axis=axis, places=False))
        each, rest = divmod(result.shape[axis], size)
        if rest == 0 and each > 1 and behind % each == 0:
            return mode.marked(result, Rows(_repeated(mode, rows.mask, each), axis, rows.first))
    raise mode.refused(func, "joins rows that values chose with an axis before them")


def _count(sizes: Sequence[int]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found


def _repeated(mode: ChosenRows, mask: Tensor, each: int) -> Tensor:
    """``[N] -> [N * each]``, each row's word for each of its parts."""

    def wide() -> Tensor:
        """``[N * each]``."""
        return torch.reshape(torch.reshape(mask, (-1, 1)).expand(mask.shape[0], each), (-1,))

    return mode.made(("each", each), (mask,), wide)


@rule("expand", "expand_as", "broadcast_to")
def expand(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """Axes of one element repeated; new ones come in front."""
    result = func(*args, **kwargs)
    rows = mode.rows(args[0])
    if rows is None:
        # To the sizes of rows that values chose: all of them are there.
        return result
    return mode.marked(result, dataclasses.replace(rows, axis=rows.axis + result.dim() - args[0].dim(), places=False))


@rule("unbind", "split", "chunk", "tensor_split")
def parts(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """Parts along an axis; of the rows themselves each part with its own."""
    x, rows = args[0], mode.rows(args[0])
    assert rows is not None
    name = plain_name(func)
    place = 1 if name == "unbind" else 2
    dim = kwargs.get("dim", args[place] if len(args) > place else 0) % x.dim()
    made = func(*args, **kwargs)
    start = 0
    for part in made:
        if dim != rows.axis:
            axis = rows.axis - (name == "unbind" and dim < rows.axis)
            mode.marked(part, dataclasses.replace(rows, axis=axis, places=False))
        elif name == "unbind" or (not isinstance(args[1], (list, tuple)) and len(made) > 1):
            raise mode.refused(func)
        else:
            # Sizes that the model asked for are those of the parts that were joined.
            mode.marked(part, Rows(_part(mode, rows.mask, start, part.shape[dim]), rows.axis))
            start += part.shape[dim]
    return made


def _part(mode: ChosenRows, mask: Tensor, start: int, size: int) -> Tensor:
    """``[N] -> [size]``."""
    return mode.made(("part", start, size), (mask,), lambda: torch.narrow(mask, 0, start, size))


@rule("cat", "concat", "concatenate", "stack", "hstack", "vstack")
def joined(mode: ChosenRows, func: Function, args: Sequence[Any], kwargs: Kwargs) -> Any:
    """Along another axis the rows go together; along their own, one after the other."""
    tensors = list(args[0] if args else kwargs["tensors"])
    name = plain_name(func)
    dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    result = func(*args, **kwargs)
    rank = tensors[0].dim()
    if name == "stack":
        dim %= rank + 1
        rows = together(mode, func, tensors, rank)
        return mode.marked(result, dataclasses.replace(rows, axis=rows.axis + (dim <= rows.axis)))
    if name in ("hstack", "vstack"):
        raise mode.refused(func)
    dim %= rank
    if any(found.axis != dim for found in map(mode.rows, tensors) if found is not None):
        return mode.marked(result, together(mode, func, tensors, rank))
    if len(tensors) == 1:
        return mode.marked(result, mode.rows(tensors[0]))
    masks = []
    for tensor in tensors:
        found = mode.rows(tensor)
        size = tensor.shape[dim]
        masks.append(mode.made(("all", size), (), partial(_all, size)) if found is None else found.mask)
    return mode.marked(result, Rows(mode.made(("cat",), masks, lambda: torch.cat(masks, 0)), dim))


def _all(size: int) -> Tensor:
    """``[size]`` of True."""
    return torch.ones((size,), dtype=torch.bool)
