"""States (iOS 18): tensors that live from one run to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs


@op("read_state")
def read_state(call: Call) -> Outputs:
    """What the state holds now; a later write does not change it."""
    return call.states[_name(call, "input")]


@op("write_state")
def write_state(call: Call) -> Outputs:
    """Replaces what the state holds."""
    _write(call, "input", "data")
    return ()


@op("coreml_update_state")
def update_state(call: Call) -> Outputs:
    """Write, then read: how coremltools spells it before it is saved."""
    return _write(call, "state", "value")


def _name(call: Call, argument: str) -> str:
    # The evaluator passes a state as its name; the tensor is looked up when the op runs.
    return str(call.value(argument))


def _write(call: Call, state: str, value: str) -> Tensor:
    """Keep a value, in the state's shape and type, and give it back."""
    name = _name(call, state)
    # No op changes a tensor in place, so that the tensor itself can be kept, in the type of the state.
    call.states[name] = call.tensor(value).to(call.states[name].dtype)
    return call.states[name]
