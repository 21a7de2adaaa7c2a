"""Compressed constants that are decompressed some rows at a time, when they are used.

A billion weights in 4 bits are two gigabytes in float16. What is too large to be decompressed once and kept stays in
the weight file, and products with it go by blocks of rows: the same numbers, rounded as if the whole had been made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeship.runtimes.coreml.program import Constant, Operation
from edgeship.runtimes.coreml.storage import BITS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Elements that are decompressed together, and below which a constant is decompressed once.
AT_ONCE = 1 << 19
DATA: Mapping[str, str] = {"constexpr_blockwise_shift_scale": "data", "constexpr_lut_to_dense": "indices"}


_SCRATCH: dict[str, Tensor] = {}


@dataclass(frozen=True)
class Packed:
    """A constant of at least two axes.

    Args:
        data: integers or indices in the weight file. others: scale and offset, or table, in memory.
        shape, dtype: of the constant as it is used.
        unit: rows that share a scale or a table, which are never cut. step: rows that are decompressed together.
    """

    data: Constant
    others: Mapping[str, Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    unit: int
    step: int

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows in float32, rounded as the whole would be; they hold until rows are asked for again.

        ``start`` and ``stop`` are multiples of `unit`, or the end.
        """
        import torch

        part = torch.from_numpy(self.data.read_rows(start, stop))
        others = {name: self._cut(value, start, stop) for name, value in self.others.items()}
        made = self._scratch("values", torch.float32, part.numel()).view(part.shape)
        if "lut" in others:
            self._look_up(part, others["lut"], made)
        else:
            made.copy_(part)
            if "offset" in others:
                _each_block(made, others["offset"]).sub_(_spread(made.shape, others["offset"]))
            _each_block(made, others["scale"]).mul_(_spread(made.shape, others["scale"]))
        if self.dtype != torch.float32:
            made.copy_(self._scratch("rounded", self.dtype, part.numel()).view(part.shape).copy_(made))
        return made

    def _look_up(self, indices: Tensor, lut: Tensor, made: Tensor) -> None:
        # Some rows of the weight, and the tables that serve them, [groups, ..., entries, 1]: one long table for all.
        import torch

        places = self._scratch("places", torch.int32, indices.numel()).view(lut.shape[0], -1)
        places.copy_(indices.reshape(lut.shape[0], -1))
        places += torch.arange(0, lut.shape[0] * lut.shape[-2], lut.shape[-2], dtype=torch.int32)[:, None]
        torch.index_select(lut.reshape(-1).float(), 0, places.view(-1), out=made.view(-1))

    def _scratch(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        """Memory that is used again: fresh pages for every block would take longer than the block. [count]."""
        import torch

        kept = _SCRATCH.get(name)
        if kept is None or kept.dtype != dtype or kept.numel() < count:
            kept = _SCRATCH[name] = torch.empty(max(count, AT_ONCE), dtype=dtype)
        return kept[:count]

    def _cut(self, value: Tensor, start: int, stop: int) -> Tensor:
        """What belongs to the rows ``start`` to ``stop``: all of it where one entry serves every row."""
        count = value.shape[0]
        return value if count == 1 else value[start * count // self.shape[0] : -(-stop * count // self.shape[0])]

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """All rows, ``(start, stop, values)`` at a time."""
        for start in range(0, self.shape[0], self.step):
            stop = min(start + self.step, self.shape[0])
            yield start, stop, self.rows(start, stop)

    def whole(self) -> Tensor:
        """All of it in memory, in its own type. The weight's own shape."""
        import torch

        made = torch.empty(self.shape, dtype=self.dtype)
        for start, stop, values in self.blocks():
            made[start:stop] = values
        return made

    def take(self, index: Tensor) -> Tensor:
        """Single rows, one after the other."""
        import torch

        found = []
        for row in index.reshape(-1).tolist():
            start = row - row % self.unit
            found.append(self.rows(start, min(start + self.unit, self.shape[0]))[row - start].to(self.dtype))
        return torch.stack(found)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x (.., C)`` times the rows, in float32."""
        import torch

        width = math.prod(self.shape[1:])
        made = torch.empty(*x.shape[:-1], self.shape[0])
        for start, stop, values in self.blocks():
            made[..., start:stop] = x @ values.reshape(-1, width).T
        return made if bias is None else made + bias


def _each_block(values: Tensor, blocks: Tensor) -> Tensor:
    """A view with two axes for each: the block, and the place in it."""
    sizes = [part for size, count in zip(values.shape, blocks.shape, strict=True) for part in (count, size // count)]
    return values.view(sizes)


def _spread(shape: Sequence[int], blocks: Tensor) -> Tensor:
    """What one number a block is for each element of `_each_block`."""
    return blocks.float().view([part for count in blocks.shape for part in (count, 1)])


def packed(operation: Operation) -> Packed | None:
    """A constexpr operation as a `Packed`; None for one that is small, or of another kind."""
    import torch

    from edgeship.runtimes.coreml.ops.registry import TORCH_DTYPES

    count, data, port = elements(operation), _data(operation), operation.outputs[0]
    if data is None or count < AT_ONCE:
        return None
    shape = tuple(size for size in port.type.shape if size is not None)
    others = {}
    for name, operands in operation.inputs.items():
        (operand,) = operands
        value = operand.read() if operand is not data and isinstance(operand, Constant) else None
        if operand is not data:
            if value is None or isinstance(value, (str, list)) or value.ndim < len(shape):
                return None
            others[name] = torch.from_numpy(value)
    if "lut" in others and others["lut"].shape[-1] != 1:
        return None
    groups = max(value.shape[0] for value in others.values())
    unit = shape[0] // groups
    width = math.prod(shape[1:])
    if any(value.shape[0] not in (1, groups) for value in others.values()) or width * BITS[data.type.dtype] % 8:
        return None
    # A table for all rows shares no rows: any number of them may be decompressed.
    unit = 1 if groups == 1 else unit
    step = unit * max(1, AT_ONCE // (unit * width))
    return Packed(data, others, shape, TORCH_DTYPES[port.type.dtype], unit, step)


def elements(operation: Operation) -> int:
    """How many numbers a constexpr operation makes, when they lie compressed in a weight file; else 0."""
    data = _data(operation)
    sizes: Sequence[int | None] = operation.outputs[0].type.shape
    if data is None or data.location is None or len(sizes) < 2:
        return 0
    return math.prod(size for size in sizes if size is not None)


def _data(operation: Operation) -> Constant | None:
    found = operation.inputs.get(DATA.get(operation.kind, ""), ())
    return found[0] if found and isinstance(found[0], Constant) else None
