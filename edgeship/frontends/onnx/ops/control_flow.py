"""If, Loop and Scan, decided and unrolled at import; sequences, which exist at import only.

A branch on a value that only the data tell is both branches and a choice between their results.
"""

from __future__ import annotations

import torch

from edgeship.errors import EdgeshipError
from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.dtypes import torch_dtype
from edgeship.frontends.onnx.registry import Result, op
from edgeship.frontends.onnx.values import Value, is_constant

Tensor = torch.Tensor

#: A longer loop would unroll into a graph that no runtime wants.
MAX_ROUNDS = 4096


@op("If")
def branch(call: OpCall) -> Result:
    """The branch that a constant condition picks, inlined; of any other condition both, where their shapes agree."""
    condition = call.x(0)
    if condition.numel() != 1:
        raise call.broken(f"its condition has {condition.numel()} elements")
    if not is_constant(condition):
        return _either(call, condition)
    name = "then_branch" if bool(condition.reshape(-1)[0].item()) else "else_branch"
    return tuple(call.run_subgraph(call.attr_graph(name), []))


def _either(call: OpCall, condition: Tensor) -> Result:
    """Both branches computed, and one of each pair of results chosen by a condition that is known at run time."""
    cause = call.cause(condition)
    sides = []
    for name in ("then_branch", "else_branch"):
        try:
            sides.append(call.run_subgraph(call.attr_graph(name), []))
        except EdgeshipError as error:
            # What one side cannot do may never be asked of it: the user knows which side is meant.
            raise call.refuse(
                f"its condition depends on {cause.names}, and its {name.replace('_', ' ')} is refused: {error.what}",
                fix=cause.fix or error.fix,
            ) from error
    chosen: list[Value] = []
    for index, (left, right) in enumerate(zip(*sides, strict=True)):
        if left is right:
            chosen.append(left)
            continue
        fits = isinstance(left, Tensor) and isinstance(right, Tensor)
        if not fits or left.shape != right.shape or left.dtype != right.dtype:  # type: ignore[union-attr]
            raise call.refuse(
                f"its condition depends on {cause.names}, and output {index} has another shape or type in each branch",
                fix=cause.fix,
            )
        assert isinstance(left, Tensor)
        # As many axes as the results: not every engine reshapes to none.
        chosen.append(torch.where(torch.reshape(condition, (1,) * left.dim()), left, right))  # type: ignore[arg-type]
    return tuple(chosen)


@op("Loop")
def loop(call: OpCall) -> Result:
    """Rounds are unrolled; their number must be known, which a condition that depends on data prevents."""
    body = call.attr_graph("body")
    limit = call.const_int(0, "the trip count") if call.given(0) else None
    going = bool(call.const(1, "the condition of Loop").reshape(-1)[0].item()) if call.given(1) else True
    state: list[Value] = list(call.inputs[2:])
    stacked: list[list[Tensor]] = [[] for _ in range(len(body.output) - 1 - len(state))]
    rounds = 0
    while going and (limit is None or rounds < limit):
        if rounds >= MAX_ROUNDS:
            raise call.refuse(f"more than {MAX_ROUNDS} rounds to unroll")
        results = call.run_subgraph(body, [torch.tensor(rounds), torch.tensor(True), *state])
        going = _still_going(call, results[0])
        state = results[1 : 1 + len(state)]
        for collected, value in zip(stacked, results[1 + len(state) :], strict=True):
            collected.append(_tensor(call, value))
        rounds += 1
    if any(not collected for collected in stacked):
        raise call.refuse("a loop without rounds has scan outputs of unknown shape")
    return (*state, *(torch.stack(collected, 0) for collected in stacked))


def _still_going(call: OpCall, condition: Value) -> bool:
    value = _tensor(call, condition)
    if not is_constant(value):
        cause = call.cause(value)
        raise call.refuse(
            f"the number of rounds depends on {cause.names}", fix=cause.fix or "export with a fixed number of rounds"
        )
    return bool(value.reshape(-1)[0].item())


@op("Scan", since=9)
def scan(call: OpCall) -> Result:
    """Rounds are unrolled: their number is the length of the scanned axis."""
    body, count = call.attr_graph("body"), call.attr_int("num_scan_inputs")
    n_states = len(call.inputs) - count
    state: list[Value] = list(call.inputs[:n_states])
    sources = call.tensors()[n_states:]
    if not sources:
        raise call.broken("it scans nothing")
    n_outputs = len(body.output) - n_states
    axes = [
        call.axis(axis, source.dim())
        for axis, source in zip(call.attr_ints("scan_input_axes", (0,) * count), sources, strict=True)
    ]
    backward = call.attr_ints("scan_input_directions", (0,) * count)
    length = sources[0].shape[axes[0]]
    if length > MAX_ROUNDS:
        raise call.refuse(f"more than {MAX_ROUNDS} rounds to unroll")
    if length == 0 and n_outputs:
        raise call.refuse("a scan without rounds has outputs of unknown shape")
    stacked: list[list[Tensor]] = [[] for _ in range(n_outputs)]
    for index in range(length):
        places = [length - 1 - index if flip else index for flip in backward]
        rows = [torch.select(s, axis, place) for s, axis, place in zip(sources, axes, places, strict=True)]
        results = call.run_subgraph(body, [*state, *rows])
        state = results[:n_states]
        for collected, value in zip(stacked, results[n_states:], strict=True):
            collected.append(_tensor(call, value))
    out_axes = call.attr_ints("scan_output_axes", (0,) * n_outputs)
    flips = call.attr_ints("scan_output_directions", (0,) * n_outputs)
    outputs = [
        torch.stack(rows[::-1] if flip else rows, axis)
        for rows, axis, flip in zip(stacked, out_axes, flips, strict=True)
    ]
    return (*state, *outputs)


@op("Scan")
def scan_batched(call: OpCall) -> Result:
    """Opset 8 scans axis 1 of each batch row on its own, up to a length for each row."""
    if call.given(0):
        raise call.refuse("sequence_lens of Scan 8 is not imported")
    body, count = call.attr_graph("body"), call.attr_int("num_scan_inputs")
    n_states = len(call.inputs) - 1 - count
    operands = [call.x(index) for index in range(1, len(call.inputs))]
    backward = call.attr_ints("directions", (0,) * count)
    rows: list[list[Tensor]] = []
    for batch in range(operands[0].shape[0]):
        # [batch, ...] -> [...]
        given = [torch.select(value, 0, batch) for value in operands]
        state: list[Value] = list(given[:n_states])
        sources = given[n_states:]
        stacked: list[list[Tensor]] = [[] for _ in body.output[n_states:]]
        length = sources[0].shape[0]
        for index in range(length):
            scanned: list[Value] = []
            for source, flip in zip(sources, backward, strict=True):
                scanned.append(torch.select(source, 0, length - 1 - index if flip else index))
            results = call.run_subgraph(body, [*state, *scanned])
            state = results[:n_states]
            for collected, value in zip(stacked, results[n_states:], strict=True):
                collected.append(_tensor(call, value))
        finals = [_tensor(call, value) for value in state]
        # Of each output of the body: its answers, [length, ...].
        scans = [torch.stack(collected, 0) for collected in stacked]
        rows.append([*finals, *scans])
    # [batch, ...] and [batch, length, ...]
    return tuple(torch.stack(list(column), 0) for column in zip(*rows, strict=True))


@op("SequenceEmpty")
def sequence_empty(call: OpCall) -> Value:
    """A sequence without elements."""
    torch_dtype(call.attr_int("dtype", 1), call.where)
    return []


@op("SequenceConstruct")
def sequence_construct(call: OpCall) -> Value:
    """The inputs as a sequence."""
    return call.tensors()


@op("SequenceInsert")
def sequence_insert(call: OpCall) -> Value:
    """A copy with one tensor more."""
    items = list(call.sequence(0))
    position = call.const_int(2, "the position") if call.given(2) else len(items)
    items.insert(position, call.x(1))
    return items


@op("SequenceErase")
def sequence_erase(call: OpCall) -> Value:
    """A copy with one tensor less."""
    items = list(call.sequence(0))
    del items[call.const_int(1, "the position") if call.given(1) else -1]
    return items


@op("SequenceAt")
def sequence_at(call: OpCall) -> Value:
    """One tensor of a sequence."""
    return call.sequence(0)[call.const_int(1, "the position")]


@op("SequenceLength")
def sequence_length(call: OpCall) -> Tensor:
    """How many tensors a sequence has, known at import. A scalar."""
    return torch.tensor(len(call.sequence(0)))


@op("SplitToSequence")
def split_to_sequence(call: OpCall) -> Value:
    """Parts along an axis: of one element, of equal size, or of given sizes."""
    x = call.x(0)
    axis = call.axis(call.attr_int("axis", 0), x.dim())
    if not call.given(1):
        parts = list(torch.split(x, 1, axis))
        return parts if call.attr_int("keepdims", 1) else [torch.squeeze(part, axis) for part in parts]
    sizes = call.const(1, "split")
    return list(torch.split(x, int(sizes.item()) if sizes.dim() == 0 else sizes.tolist(), axis))


@op("ConcatFromSequence")
def concat_from_sequence(call: OpCall) -> Tensor:
    """All tensors along an axis, old or new."""
    items = call.sequence(0)
    if call.attr_int("new_axis", 0):
        return torch.stack(items, call.attr_int("axis"))
    return torch.cat(items, call.attr_int("axis"))


def _tensor(call: OpCall, value: Value) -> Tensor:
    """``value`` of any shape; refused where it is a sequence."""
    if not isinstance(value, Tensor):
        raise call.refuse("its body collects something that is not a tensor")
    return value
