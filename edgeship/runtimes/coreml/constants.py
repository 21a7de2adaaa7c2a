"""The constants of a package in memory: read or decompressed once for all its functions, or left in the weight file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeship.runtimes.coreml.packed import elements, packed
from edgeship.runtimes.coreml.program import Constant, Operation, Program
from edgeship.runtimes.coreml.values import to_value

if TYPE_CHECKING:
    from torch import Tensor

#: Constants that are kept in float32 as well, so that a run need not widen them: at most this much.
MAX_WIDENED_BYTES = 1 << 30
#: Compressed constants are decompressed once, when a package is opened, when all of them take at most this.
MAX_DECOMPRESSED_BYTES = 1 << 30


@dataclass
class Constants:
    """What functions of one package hold together: constants by where they lie, and float32 forms by identity.

    The tensor that a float32 form belongs to is kept with it, so that its identity is not given away again.

    Args:
        lean: large compressed constants stay in the weight file, and are decompressed by rows when they are used.
    """

    lean: bool
    held: dict[tuple[Any, ...], list[Any]] = field(default_factory=dict)
    widened: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    widened_bytes: int = 0

    @classmethod
    def of(cls, program: Program) -> Constants:
        """None read yet."""
        sizes = {
            _key(operation): elements(operation)
            for function in program.functions.values()
            for operation in function.block.operations
            if operation.is_constant
        }
        return cls(2 * sum(sizes.values()) > MAX_DECOMPRESSED_BYTES)

    def plain(self, operation: Operation) -> Any:
        """The value of a ``const``."""
        (stored,) = operation.inputs["val"]
        assert isinstance(stored, Constant)
        if stored.location is None:
            return to_value(stored.read())
        key = _key(operation)
        if key not in self.held:
            self.held[key] = [to_value(stored.read())]
        return self.held[key][0]

    def compressed(self, operation: Operation, run: Callable[[Sequence[Constant]], list[Any]]) -> list[Any]:
        """What a constexpr operation makes.

        Args:
            run: decompresses, from the operands that are written in the file.
        """
        operands = [operand for operands in operation.inputs.values() for operand in operands]
        stored = [operand for operand in operands if isinstance(operand, Constant)]
        if len(stored) != len(operands) or not all(constant.location for constant in stored):
            return run(stored)
        key = _key(operation)
        if key not in self.held:
            lean = packed(operation) if self.lean else None
            self.held[key] = run(stored) if lean is None else [lean]
        return self.held[key]

    def widen(self, tensor: Tensor, constant: bool) -> Tensor:
        """A tensor as float32; of a constant the form is kept, within MAX_WIDENED_BYTES. Any shape."""
        import torch

        if tensor.dtype == torch.float32:
            return tensor
        if id(tensor) in self.widened:
            return self.widened[id(tensor)][1]
        wide = tensor.to(torch.float32)
        size = wide.numel() * 4
        if constant and self.widened_bytes + size <= MAX_WIDENED_BYTES:
            self.widened[id(tensor)] = tensor, wide
            self.widened_bytes += size
        return wide


def _key(operation: Operation) -> tuple[Any, ...]:
    """What tells constants apart: the operation, where its operands lie, and what it gives."""
    places = tuple(
        (name, operand.location, operand.type)
        for name, operands in operation.inputs.items()
        for operand in operands
        if isinstance(operand, Constant)
    )
    return (operation.kind, places, tuple(port.type for port in operation.outputs))
