"""One step of a recurrent layer (``nn.LSTMCell`` and its kin), written out: converters know whole layers, not steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph


def spell_cells(graph: Graph) -> None:
    """Write out each step as two linear layers and what its gates do."""
    import torch

    aten = torch.ops.aten
    table: dict[Any, Any] = {
        aten.lstm_cell.default: lstm_step, aten.gru_cell.default: _gru, aten.rnn_tanh_cell.default: _tanh,
        aten.rnn_relu_cell.default: _relu,
    }  # fmt: skip
    for node in graph.nodes:
        if node.op == "call_function" and node.target in table:
            node.target = table[node.target]


def lstm_step(
    x: torch.Tensor, state: Any, weight: torch.Tensor, recurrent: torch.Tensor,
    bias: torch.Tensor | None = None, recurrent_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """[N, in] and two [N, hidden] -> two [N, hidden]; weights [4 * hidden, in] and [4 * hidden, hidden]."""
    import torch
    import torch.nn.functional as F

    hidden, cell = state
    gates = F.linear(x, weight, bias) + F.linear(hidden, recurrent, recurrent_bias)
    enter, forget, candidate, leave = torch.chunk(gates, 4, 1)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(candidate)
    return torch.sigmoid(leave) * torch.tanh(cell), cell


def _gru(
    x: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, recurrent: torch.Tensor,
    bias: torch.Tensor | None = None, recurrent_bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """[N, in] and [N, hidden] -> [N, hidden]; weights [3 * hidden, in] and [3 * hidden, hidden]."""
    import torch
    import torch.nn.functional as F

    given = torch.chunk(F.linear(x, weight, bias), 3, 1)
    kept = torch.chunk(F.linear(hidden, recurrent, recurrent_bias), 3, 1)
    reset, update = torch.sigmoid(given[0] + kept[0]), torch.sigmoid(given[1] + kept[1])
    candidate = torch.tanh(given[2] + reset * kept[2])
    return candidate + update * (hidden - candidate)


def _sum(
    x: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, recurrent: torch.Tensor,
    bias: torch.Tensor | None = None, recurrent_bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """[N, in] and [N, hidden] -> [N, hidden]."""
    import torch.nn.functional as F

    return F.linear(x, weight, bias) + F.linear(hidden, recurrent, recurrent_bias)


def _tanh(*arguments: Any) -> torch.Tensor:
    """As `_sum`: [N, hidden]."""
    import torch

    return torch.tanh(_sum(*arguments))


def _relu(*arguments: Any) -> torch.Tensor:
    """As `_sum`: [N, hidden]."""
    import torch

    return torch.relu(_sum(*arguments))
