"""How an operation is written: a function from a ``Call`` to its outputs, registered under its names.

    @op("relu")
    def relu(call: Call) -> Tensor:
        return torch.relu(call.floats("x"))

A function computes in float32 or int64; the evaluator rounds what it returns to the type the program declares.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from edgeship.errors import ArtifactError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgeship.runtimes.coreml.program import Block, Operation, Port, ValueType

OPSET_IOS17 = 7

#: torch's type for each of the program's; integers of fewer than eight bits live in a byte.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "bool": torch.bool, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64,
    "int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64, "int4": torch.int8,
    "uint8": torch.uint8, "uint16": torch.uint16, "uint32": torch.uint32, "uint64": torch.uint64,
    "uint1": torch.uint8, "uint2": torch.uint8, "uint3": torch.uint8, "uint4": torch.uint8, "uint6": torch.uint8,
}  # fmt: skip


@dataclass
class ListValue:
    """A MIL list: tensors of one shape; None where nothing was written yet. Written copies share the tensors."""

    items: list[Tensor | None]
    dynamic: bool
    element: ValueType  #: the declared type of the list, whose shape is that of an element


Value = Tensor | str | list[str] | ListValue
Outputs = Value | tuple[Value, ...]


@dataclass
class Call:
    """One execution of one operation: its arguments by name, with the defaults left to the caller."""

    operation: Operation
    arguments: Mapping[str, Sequence[Value]]
    opset: int
    #: Runs a nested block on values for its inputs.
    run_block: Callable[[Block, Sequence[Value]], list[Value]]
    #: The states, which ``write_state`` changes.
    states: dict[str, Tensor]
    #: float32 copies of constants, so that weights are not widened again in every run.
    widen: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor.to(torch.float32))

    @property
    def outputs(self) -> tuple[Port, ...]:
        """The declared outputs."""
        return self.operation.outputs

    def has(self, name: str) -> bool:
        """Whether the optional argument is given."""
        return bool(self.arguments.get(name))

    def value(self, name: str) -> Value:
        """A required argument, whatever it is."""
        given = self.arguments.get(name)
        if not given:
            raise ArtifactError(f"{self.operation.label} lacks its argument {name}", fix="build the package again")
        return given[0]

    def tensor(self, name: str) -> Tensor:
        """A required tensor, in its stored type. Any shape."""
        value = self.value(name)
        if not isinstance(value, Tensor):
            raise ArtifactError(f"{self.operation.label}: {name} is not a tensor", fix="build the package again")
        return value

    def tensors(self, name: str) -> list[Tensor]:
        """A variadic argument. Any shapes."""
        return [movable(value) for value in self.arguments.get(name, ()) if isinstance(value, Tensor)]

    def data(self, name: str) -> Tensor:
        """A required tensor to move about unchanged: in its stored type, if torch can index that. Any shape."""
        return movable(self.tensor(name))

    def floats(self, name: str) -> Tensor:
        """A required tensor as float32. Any shape."""
        return self.widen(self.tensor(name))

    def optional_floats(self, name: str) -> Tensor | None:
        """A tensor as float32, or None if it is not given. Any shape."""
        return self.floats(name) if self.has(name) else None

    def numbers(self, name: str) -> Tensor:
        """A required tensor in the type to compute in: float32, int64 or bool. Any shape."""
        return computable(self.tensor(name))

    @overload
    def integer(self, name: str) -> int: ...
    @overload
    def integer(self, name: str, default: int) -> int: ...
    def integer(self, name: str, default: int | None = None) -> int:
        """A scalar integer argument."""
        if default is not None and not self.has(name):
            return default
        return int(self.tensor(name).item())

    def number(self, name: str, default: float | None = None) -> float:
        """A scalar argument as a Python float."""
        if default is not None and not self.has(name):
            return default
        return float(self.tensor(name).item())

    def flag(self, name: str, default: bool = False) -> bool:
        """A scalar bool argument."""
        return bool(self.tensor(name).item()) if self.has(name) else default

    def text(self, name: str, default: str) -> str:
        """A string argument."""
        return str(self.value(name)) if self.has(name) else default

    def integers(self, name: str) -> list[int]:
        """A required vector of integers; a scalar is a vector of one."""
        return [int(i) for i in self.tensor(name).reshape(-1).to(torch.int64).tolist()]

    def optional_integers(self, name: str) -> list[int] | None:
        """A vector of integers, or None if it is not given."""
        return self.integers(name) if self.has(name) else None

    def axes(self, rank: int) -> list[int]:
        """The argument ``axes``, made non-negative; every axis if it is not given."""
        given = self.optional_integers("axes")
        return list(range(rank)) if given is None else [axis % rank for axis in given]

    def axis(self, name: str, default: int | None, rank: int) -> int:
        """An axis argument, made non-negative."""
        axis = self.integer(name) if default is None else self.integer(name, default)
        if not -rank <= axis < max(rank, 1):
            raise ArtifactError(
                f"{self.operation.label}: {name}={axis} of a tensor of rank {rank}", fix="build it again"
            )
        return axis % rank if rank else 0

    def declared_shape(self, output: int = 0) -> tuple[int, ...] | None:
        """The shape the program declares for an output, if all of it is known before the run."""
        shape = self.outputs[output].type.shape
        known = tuple(size for size in shape if size is not None)
        return known if len(known) == len(shape) else None

    def index(self, name: str, size: int) -> Tensor:
        """An index argument as int64 in ``[0, size)``; see ``checked``. Any shape."""
        return self.checked(self.tensor(name).to(torch.int64), size)

    def checked(self, index: Tensor, size: int) -> Tensor:
        """``index`` in ``[0, size)``; until iOS 16 negative ones count from the end.

        Core ML leaves any other index undefined, so an evaluator has no right answer to give: DataError.

        Any shape.
        """
        least = -size if self.opset < OPSET_IOS17 else 0
        if index.numel():
            low, high = int(index.min()), int(index.max())
            if low < least or high >= size:
                raise DataError(
                    f"{self.operation.label}: index {low if low < least else high} of an axis of {size}",
                    fix="the result on a device is undefined: check the inputs",
                )
            if low < 0:
                index = torch.where(index < 0, index + size, index)
        return index


def computable(tensor: Tensor) -> Tensor:
    """``tensor`` in the type to compute in: float32, int64 or bool. Any shape."""
    if tensor.dtype == torch.bool:
        return tensor
    return tensor.to(torch.float32 if tensor.dtype.is_floating_point else torch.int64)


def movable(tensor: Tensor) -> Tensor:
    """``tensor`` in a type that torch can index and copy; the wider unsigned integers are not. Any shape."""
    return tensor.to(torch.int64) if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else tensor


#: Every operation the evaluator knows, by its MIL name.
OPERATIONS: dict[str, Callable[[Call], Outputs]] = {}


def op(*names: str) -> Callable[[Callable[[Call], Outputs]], Callable[[Call], Outputs]]:
    """Registers a function as the implementation of the operations ``names``."""

    def register(function: Callable[[Call], Outputs]) -> Callable[[Call], Outputs]:
        for name in names:
            if name in OPERATIONS:
                raise ValueError(f"operation {name} is registered twice")
            OPERATIONS[name] = function
        return function

    return register
