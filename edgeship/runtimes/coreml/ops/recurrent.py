"""Recurrent layers over a sequence (steps, batch, features)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgeship.errors import UnsupportedOpError
from edgeship.runtimes.coreml.ops.registry import Call, op

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import Outputs

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "linear": lambda x: x,
    # Within a recurrent layer Core ML fixes the constants of these: 0.2 and 0.5, and 1 and 1.
    "hard_sigmoid": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "sigmoid_hard": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "scaled_tanh": torch.tanh,
}


def _activation(call: Call, name: str, default: str) -> Callable[[Tensor], Tensor]:
    """The function that an argument names, of any shape."""
    chosen = call.text(name, default)
    if chosen not in _ACTIVATIONS:
        raise UnsupportedOpError(f"{call.operation.label}: {name} {chosen}", fix=f"known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[chosen]


def _run(
    call: Call, steps: Tensor, reverse: bool, state: Tensor, step: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """All hidden states in the order they were computed (or the last, as one step), and the last.

    ``steps`` [T, N, in], ``state`` [N, H] (2 * H of an LSTM) -> [T, N, H] (or [1, N, H]) and [N, H].
    """
    history = []
    for x in torch.flip(steps, [0]) if reverse else steps:
        state = step(x, state)
        history.append(state)
    if not call.flag("output_sequence"):
        return state.unsqueeze(0), state
    return torch.stack(history), state


@op("rnn")
def rnn(call: Call) -> Outputs:
    """``h = activation(W x + R h + b)``."""
    inner, outer = call.floats("weight_ih"), call.floats("weight_hh")
    bias = call.floats("bias") if call.has("bias") else torch.zeros(outer.shape[0])
    activation = _activation(call, "activation", "tanh")
    backwards = call.text("direction", "forward") == "reverse"
    return _run(call, call.floats("x"), backwards, call.floats("initial_h"),
                lambda x, h: activation(x @ inner.T + h @ outer.T + bias))  # fmt: skip


@op("gru")
def gru(call: Call) -> Outputs:
    """Gates in the order reset, output, update; ``reset_after`` resets the product instead of the state."""
    inner, outer = call.floats("weight_ih"), call.floats("weight_hh")
    size = outer.shape[1]
    bias = call.floats("bias") if call.has("bias") else torch.zeros(3 * size)
    input_bias = call.floats("input_bias") if call.has("input_bias") else torch.zeros(3 * size)
    gate, activation = _activation(call, "recurrent_activation", "sigmoid"), _activation(call, "activation", "tanh")
    after = call.flag("reset_after")

    def step(x: Tensor, h: Tensor) -> Tensor:
        """``x`` [N, in], ``h`` [N, H]."""
        from_x = torch.split(x @ inner.T + input_bias, size, dim=-1)
        from_h = torch.split(h @ outer.T + bias, size, dim=-1)
        reset, update = gate(from_x[0] + from_h[0]), gate(from_x[2] + from_h[2])
        candidate = reset * from_h[1] if after else (reset * h) @ outer[size : 2 * size].T + bias[size : 2 * size]
        return (1 - update) * activation(from_x[1] + candidate) + update * h

    backwards = call.text("direction", "forward") == "reverse"
    return _run(call, call.floats("x"), backwards, call.floats("initial_h"), step)


@op("lstm")
def lstm(call: Call) -> Outputs:
    """Gates in the order input, forget, output, cell; both directions side by side if bidirectional."""
    h, c = call.floats("initial_h"), call.floats("initial_c")
    direction = call.text("direction", "forward")
    if direction != "bidirectional":
        return _lstm(call, "", direction == "reverse", h, c)
    (h_forward, h_back), (c_forward, c_back) = h.chunk(2, dim=-1), c.chunk(2, dim=-1)
    ahead, h_ahead, c_ahead = _lstm(call, "", False, h_forward, c_forward)
    back, h_last, c_last = _lstm(call, "_back", True, h_back, c_back)
    # Side by side the two run in one direction of time; alone, a reversed layer answers in the order it computes.
    sequence = torch.cat([ahead, torch.flip(back, [0])], dim=-1)
    return sequence, torch.cat([h_ahead, h_last], dim=-1), torch.cat([c_ahead, c_last], dim=-1)


def _lstm(call: Call, suffix: str, reverse: bool, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One direction: ``h`` and ``c`` [N, H]."""
    inner, outer = call.floats(f"weight_ih{suffix}"), call.floats(f"weight_hh{suffix}")
    size = outer.shape[1]
    bias = call.floats(f"bias{suffix}") if call.has(f"bias{suffix}") else torch.zeros(4 * size)
    peephole = call.floats(f"peephole{suffix}") if call.has(f"peephole{suffix}") else torch.zeros(3 * size)
    from_cell = torch.split(peephole, size)
    gate = _activation(call, "recurrent_activation", "sigmoid")
    cell, activation = _activation(call, "cell_activation", "tanh"), _activation(call, "activation", "tanh")
    limit = call.number("clip") if call.has("clip") else None

    def step(x: Tensor, state: Tensor) -> Tensor:
        # One tensor carries hidden and cell state, so that every layer runs through the same loop.
        """``x`` [N, in], ``state`` [N, 2 * H]."""
        h, c = state.chunk(2, dim=-1)
        i, f, o, z = torch.split(x @ inner.T + h @ outer.T + bias, size, dim=-1)
        keep, take = gate(f + from_cell[1] * c), gate(i + from_cell[0] * c)
        c = keep * c + take * cell(z)
        if limit is not None:
            c = c.clamp(-limit, limit)
        return torch.cat([gate(o + from_cell[2] * c) * activation(c), c], dim=-1)

    sequence, last = _run(call, call.floats("x"), reverse, torch.cat([h, c], dim=-1), step)
    h, c = last.chunk(2, dim=-1)
    return sequence.chunk(2, dim=-1)[0], h, c
