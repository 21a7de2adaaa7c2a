"""LSTM, GRU and RNN, unrolled over their static sequence length where torch's own cells do not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from edgeship.frontends.onnx.call import OpCall
from edgeship.frontends.onnx.registry import Result, op

Tensor = torch.Tensor
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Direction:
    """What one direction of a recurrent layer works with; W is [gates*hidden, in], R is [gates*hidden, hidden]."""

    w: Tensor
    r: Tensor
    w_bias: Tensor | None
    r_bias: Tensor | None
    peephole: Tensor | None
    activations: Sequence[Callable[[Tensor], Tensor]]
    initial: State
    hidden: int
    clip: float


Cell = Callable[[Tensor, State, Direction], State]


@op("LSTM")
def lstm(call: OpCall) -> Result:
    """Outputs Y, Y_h, Y_c."""
    if call.attr_int("input_forget", 0):
        cell: Cell = _lstm_step_coupled
    else:
        cell = _lstm_step
    return _layer(call, cell, gates=4, states=2, defaults=("Sigmoid", "Tanh", "Tanh"))


@op("GRU")
def gru(call: OpCall) -> Result:
    """Outputs Y, Y_h."""
    cell = _gru_step_after if call.attr_int("linear_before_reset", 0) else _gru_step
    return _layer(call, cell, gates=3, states=1, defaults=("Sigmoid", "Tanh"))


@op("RNN")
def rnn(call: OpCall) -> Result:
    """Outputs Y, Y_h."""
    return _layer(call, _rnn_step, gates=1, states=1, defaults=("Tanh",))


def _lstm_step(x: Tensor, state: State, d: Direction) -> State:
    """``x`` [batch, 4 * hidden], each state [batch, hidden]."""
    return _lstm_cell(x, state, d, coupled=False)


def _lstm_step_coupled(x: Tensor, state: State, d: Direction) -> State:
    """As `_lstm_step`, where the forget gate is one less the input gate; states [batch, hidden]."""
    return _lstm_cell(x, state, d, coupled=True)


def _lstm_cell(x: Tensor, state: State, d: Direction, *, coupled: bool) -> State:
    """Gates in ONNX order: input, output, forget, cell. ``x`` [batch, 4 * hidden], each state [batch, hidden]."""
    h, c = state
    i, o, f, g = torch.chunk(torch.add(x, F.linear(h, d.r, d.r_bias)), 4, -1)
    peep_i, peep_o, peep_f = torch.chunk(d.peephole, 3) if d.peephole is not None else (None, None, None)
    gate, candidate, out = d.activations
    i = gate(_clip(_peep(i, c, peep_i), d.clip))
    f = torch.rsub(i, 1.0) if coupled else gate(_clip(_peep(f, c, peep_f), d.clip))
    cell = torch.add(torch.mul(f, c), torch.mul(i, candidate(_clip(g, d.clip))))
    o = gate(_clip(_peep(o, cell, peep_o), d.clip))
    return torch.mul(o, out(cell)), cell


def _gru_step(x: Tensor, state: State, d: Direction) -> State:
    """The reset gate acts before the recurrent product. Gates in ONNX order: update, reset, hidden.

    ``x`` [batch, 3 * hidden], the state [batch, hidden].
    """
    h = state[0]
    bias = d.r_bias
    x_zr, x_h = torch.split(x, [2 * d.hidden, d.hidden], -1)
    r_zr, r_h = torch.split(d.r, [2 * d.hidden, d.hidden], 0)
    b_zr, b_h = torch.split(bias, [2 * d.hidden, d.hidden]) if bias is not None else (None, None)
    z, r = torch.chunk(d.activations[0](_clip(torch.add(x_zr, F.linear(h, r_zr, b_zr)), d.clip)), 2, -1)
    n = d.activations[1](_clip(torch.add(x_h, F.linear(torch.mul(r, h), r_h, b_h)), d.clip))
    return (torch.add(torch.mul(torch.rsub(z, 1.0), n), torch.mul(z, h)),)


def _gru_step_after(x: Tensor, state: State, d: Direction) -> State:
    """The reset gate acts on the recurrent product, as cuDNN and torch have it.

    ``x`` [batch, 3 * hidden], the state [batch, hidden].
    """
    h = state[0]
    x_zr, x_h = torch.split(x, [2 * d.hidden, d.hidden], -1)
    h_zr, h_h = torch.split(F.linear(h, d.r, d.r_bias), [2 * d.hidden, d.hidden], -1)
    z, r = torch.chunk(d.activations[0](_clip(torch.add(x_zr, h_zr), d.clip)), 2, -1)
    n = d.activations[1](_clip(torch.add(x_h, torch.mul(r, h_h)), d.clip))
    return (torch.add(torch.mul(torch.rsub(z, 1.0), n), torch.mul(z, h)),)


def _rnn_step(x: Tensor, state: State, d: Direction) -> State:
    """``x`` and the state: [batch, hidden]."""
    return (d.activations[0](_clip(torch.add(x, F.linear(state[0], d.r, d.r_bias)), d.clip)),)


def _peep(gate: Tensor, cell: Tensor, peephole: Tensor | None) -> Tensor:
    """``gate`` and ``cell`` [batch, hidden], ``peephole`` [hidden]."""
    return gate if peephole is None else torch.add(gate, torch.mul(cell, peephole))


def _clip(x: Tensor, limit: float) -> Tensor:
    """Any shape; a limit of 0 is none."""
    return torch.clamp(x, -limit, limit) if limit > 0 else x


def _layer(call: OpCall, cell: Cell, *, gates: int, states: int, defaults: Sequence[str]) -> Result:
    """All directions of a layer. X is [time, batch, in], or [batch, time, in] with ``layout`` 1."""
    x = call.x(0)
    batch_first = bool(call.attr_int("layout", 0))
    if batch_first:
        x = torch.transpose(x, 0, 1)
    time, batch = x.shape[0], x.shape[1]
    direction = call.attr_text("direction", "forward")
    count = 2 if direction == "bidirectional" else 1
    lengths = call.optional(4)
    ys, finals = [], []
    for index in range(count):
        part = _direction(call, index, count, gates, states, defaults, batch, batch_first)
        backward = direction == "reverse" or index == 1
        y, final = _unroll(x, cell, part, lengths, backward=backward)
        ys.append(y)
        finals.append(final)
    # [time, directions, batch, hidden]; of each state its last values, [directions, batch, hidden]
    y = torch.stack(ys, 1)
    lasts = [torch.stack(of_each_direction, 0) for of_each_direction in zip(*finals, strict=True)]
    if batch_first:
        y = torch.permute(y, (2, 0, 1, 3))
        lasts = [torch.transpose(last, 0, 1) for last in lasts]
    if time == 0:
        raise call.broken("the sequence is empty")
    return y, *lasts


def _unroll(x: Tensor, cell: Cell, d: Direction, lengths: Tensor | None, *, backward: bool) -> tuple[Tensor, State]:
    """Outputs [time, batch, hidden] and the final state; rows past their length are 0."""
    # [time, batch, in] -> time x [batch, gates * hidden], in one product
    projected = torch.unbind(F.linear(x, d.w, d.w_bias), 0)
    order = range(len(projected))
    outputs: list[Tensor] = [x] * len(projected)
    state = d.initial
    for time in reversed(order) if backward else order:
        fresh = cell(projected[time], state, d)
        if lengths is None:
            state, outputs[time] = fresh, fresh[0]
            continue
        # [batch] -> [batch, 1]
        alive = torch.reshape(lengths > time, (-1, 1))
        state = tuple(torch.where(alive, new, old) for new, old in zip(fresh, state, strict=True))
        outputs[time] = torch.where(alive, fresh[0], torch.zeros_like(fresh[0]))
    return torch.stack(outputs, 0), state


def _direction(
    call: OpCall,
    index: int,
    count: int,
    gates: int,
    states: int,
    defaults: Sequence[str],
    batch: int,
    batch_first: bool,
) -> Direction:
    def part(position: int, what: str) -> Tensor | None:
        """The weights of one direction: [directions, ...] -> [...]."""
        if not call.given(position):
            return None
        return call.constants.derive(call.weight(position), f"direction {index}{what}", lambda t: t.select(0, index))

    w, r = part(1, ""), part(2, "")
    if w is None or r is None:
        raise call.broken("its weights are missing")
    hidden = r.shape[-1]
    bias = call.optional_weight(3)
    w_bias = r_bias = None
    if bias is not None:
        size = gates * hidden
        w_bias = call.constants.derive(bias, f"w {index}", lambda t: torch.narrow(t.select(0, index), 0, 0, size))
        r_bias = call.constants.derive(bias, f"r {index}", lambda t: torch.narrow(t.select(0, index), 0, size, size))
    initial = []
    for place in range(states):
        given = call.optional(5 + place)
        if given is None:
            initial.append(torch.zeros((batch, hidden), dtype=call.x(0).dtype))
        else:
            initial.append(torch.select(given, 1 if batch_first else 0, index))
    names = call.attr_texts("activations", list(defaults) * count)[index * len(defaults) :][: len(defaults)]
    alphas, betas = call.attr_floats("activation_alpha", ()), call.attr_floats("activation_beta", ())
    functions = [_activation(call, name, alphas, betas) for name in names]
    peephole = part(7, "") if gates == 4 else None
    return Direction(w, r, w_bias, r_bias, peephole, functions, tuple(initial), hidden, call.attr_float("clip", 0.0))


def _activation(call: OpCall, name: str, alphas: Sequence[float], betas: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """The function that ``name`` means, of any shape."""
    plain: dict[str, Callable[[Tensor], Tensor]] = {
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "softsign": F.softsign,
        "softplus": F.softplus,
    }
    if name.lower() in plain:
        return plain[name.lower()]
    # Which function an alpha belongs to is only clear where all have the same one.
    if len(set(alphas)) > 1 or len(set(betas)) > 1:
        raise call.refuse(f"activation {name} with several alphas")
    alpha, beta = next(iter(alphas), None), next(iter(betas), None)
    if name.lower() == "leakyrelu":
        return lambda t: F.leaky_relu(t, 0.01 if alpha is None else alpha)
    if name.lower() == "elu":
        return lambda t: F.elu(t, 1.0 if alpha is None else alpha)
    if name.lower() == "hardsigmoid":
        a, b = 0.2 if alpha is None else alpha, 0.5 if beta is None else beta
        return lambda t: torch.clamp(torch.add(torch.mul(t, a), b), 0.0, 1.0)
    if name.lower() == "thresholdedrelu":
        return lambda t: F.threshold(t, 1.0 if alpha is None else alpha, 0.0)
    raise call.refuse(f"activation {name}")
