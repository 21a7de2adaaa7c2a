"""Run a function for several inputs in a row, operation by operation instead of input by input.

The states hand one run's keys and values to the next, but only through the operations that read and write a state; all
others can be run for every input before the next operation is looked at, so that a large weight is decompressed once.
The answers are those of one run after another, up to the order of float32 sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeship.runtimes.coreml.packed import Packed
from edgeship.runtimes.coreml.program import Block, Operation, Reference

if TYPE_CHECKING:
    from torch import Tensor

Values = dict[str, Any]
Execute = Callable[[Operation, Values], None]
Together = Callable[[Operation, Sequence[Values]], bool]
STATEFUL = ("read_state", "write_state", "coreml_update_state")


@dataclass(frozen=True)
class Stage:
    """Operations that are run together.

    Args:
        in_turn: all of them for one input, then for the next; else each for all inputs.
        dropped: values that are not used after.
    """

    operations: tuple[Operation, ...]
    in_turn: bool
    dropped: tuple[str, ...]


def stages(block: Block) -> tuple[Stage, ...]:
    """The operations of a function in stages: those between the first and last touch of a state go in turn."""
    operations = _late_reads([operation for operation in block.operations if not operation.is_constant])
    reach: dict[str, list[int]] = {}
    for index, operation in enumerate(operations):
        if operation.kind in STATEFUL:
            reach.setdefault(_state(operation), []).append(index)
    ends = {min(found): max(found) for found in reach.values()}
    last: dict[str, int] = {}
    for index, operation in enumerate(operations):
        last.update(dict.fromkeys([*operation.names_used(), *(port.name for port in operation.outputs)], index))
    made: list[Stage] = []
    index = 0
    while index < len(operations):
        stop = index
        in_turn = index in ends
        while in_turn and any(start <= stop and end > stop for start, end in ends.items() if start >= index):
            stop += 1
        dropped = tuple(name for name, end in last.items() if index <= end <= stop and name not in block.outputs)
        made.append(Stage(tuple(operations[index : stop + 1]), in_turn, dropped))
        index = stop + 1
    return tuple(made)


def _late_reads(operations: Sequence[Operation]) -> list[Operation]:
    """Each first read of a state put off until something wants it: converters read all states at the start."""
    waiting: dict[str, Operation] = {}
    ordered: list[Operation] = []
    for operation in operations:
        if operation.kind == "read_state" and _state(operation) not in {
            _state(o) for o in ordered if o.kind in STATEFUL
        }:
            waiting[operation.outputs[0].name] = operation
            continue
        touched = _state(operation) if operation.kind in STATEFUL else None
        due = [n for n, o in waiting.items() if n in operation.names_used() or _state(o) == touched]
        ordered += [*(waiting.pop(name) for name in due), operation]
    return [*ordered, *waiting.values()]


def _state(operation: Operation) -> str:
    (operand,) = operation.inputs["state" if operation.kind == "coreml_update_state" else "input"]
    return operand.name if isinstance(operand, Reference) else ""


def run_stages(found: Sequence[Stage], runs: Sequence[Values], execute: Execute, together: Together) -> None:
    """Run every stage on the values of each run, which are changed.

    Args:
        execute: runs one operation on the values of one run.
        together: runs one operation with a packed operand on all runs, or returns False.
    """
    for stage in found:
        if stage.in_turn:
            for values in runs:
                for operation in stage.operations:
                    execute(operation, values)
        else:
            for operation in stage.operations:
                _for_all(operation, runs, execute, together)
        for values in runs:
            for name in stage.dropped:
                values.pop(name, None)


def _for_all(operation: Operation, runs: Sequence[Values], execute: Execute, together: Together) -> None:
    held = [name for name in operation.names_used() if isinstance(runs[0].get(name), Packed)]
    if held and together(operation, runs):
        return
    whole = {name: runs[0][name].whole() for name in held}
    for values in runs:
        if not whole:
            execute(operation, values)
            continue
        scratch = {**values, **whole}
        execute(operation, scratch)
        values.update({port.name: scratch[port.name] for port in operation.outputs})


def multiply(
    operation: Operation, inputs: Sequence[Tensor], weight: Packed, bias: Tensor | None
) -> list[Tensor] | None:
    """A linear layer or a 1x1 convolution for several inputs; None when it is another operation."""
    import torch

    if operation.kind == "linear":
        rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
        sizes = [x.numel() // x.shape[-1] for x in inputs]
        made = torch.split(weight.product(rows, bias), sizes)
        return [part.reshape(*x.shape[:-1], -1) for part, x in zip(made, inputs, strict=True)]
    if operation.kind != "conv" or weight.shape[2:] != (1, 1):
        return None
    for x in inputs:
        if (x.shape[0], x.shape[2]) != (1, 1):
            return None
    # [1, C, 1, T] -> [T, C], and back
    rows = torch.cat([x[0, :, 0].T for x in inputs])
    made = torch.split(weight.product(rows, bias), [x.shape[3] for x in inputs])
    return [part.T[None, :, None] for part in made]
