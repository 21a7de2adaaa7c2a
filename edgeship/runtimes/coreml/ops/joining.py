"""Putting tensors together, taking them apart, repeating and padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from edgeship.errors import UnsupportedOpError
from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from edgeship.runtimes.coreml.ops.registry import Outputs


@op("concat")
def concat(call: Call) -> Outputs:
    """Along ``axis``; interleaved, element i of each in turn. Scalars count as vectors of one."""
    values = [value.reshape(1) if value.dim() == 0 else value for value in call.tensors("values")]
    axis = call.axis("axis", None, values[0].dim())
    if not call.flag("interleave"):
        return torch.cat(values, dim=axis)
    return torch.stack(values, dim=axis + 1).flatten(axis, axis + 1)


@op("stack")
def stack(call: Call) -> Outputs:
    """Along a new axis."""
    values = call.tensors("values")
    return torch.stack(values, dim=call.axis("axis", None, values[0].dim() + 1))


@op("split")
def split(call: Call) -> Outputs:
    """Along ``axis`` in ``split_sizes``, or in ``num_splits`` equal parts."""
    x = call.data("x")
    axis = call.axis("axis", None, x.dim())
    sizes = call.optional_integers("split_sizes")
    if sizes is None:
        sizes = [x.shape[axis] // call.integer("num_splits")] * call.integer("num_splits")
    return tuple(torch.split(x, sizes, dim=axis))


@op("tile")
def tile(call: Call) -> Outputs:
    """Repeated ``reps[i]`` times along axis i."""
    return call.data("x").repeat(call.integers("reps"))


@op("pad")
def pad(call: Call) -> Outputs:
    """The last axes padded by (before, after) pairs: constant, reflect (edge not repeated) or replicate."""
    x = call.data("x")
    amounts = call.integers("pad")
    pairs = [(0, 0)] * (x.dim() - len(amounts) // 2) + list(zip(amounts[::2], amounts[1::2], strict=True))
    mode = call.text("mode", "constant")
    if mode == "constant":
        # Not torch's pad, which goes through float for integers and knows no bool.
        value = call.tensor("constant_val").item() if call.has("constant_val") else 0
        shape = [size + before + after for size, (before, after) in zip(x.shape, pairs, strict=True)]
        padded = torch.full(shape, value, dtype=x.dtype)
        padded[tuple(slice(before, before + size) for size, (before, _) in zip(x.shape, pairs, strict=True))] = x
        return padded
    if mode not in ("reflect", "replicate"):
        raise UnsupportedOpError(f"{call.operation.label}: mode {mode}", fix="known: constant, reflect, replicate")
    return torch.from_numpy(np.pad(x.numpy(), pairs, "edge" if mode == "replicate" else "reflect"))
