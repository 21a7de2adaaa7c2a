"""Which outputs hold rows in an order that scores made, and which of them belong together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgeship.core.model import TensorSpec
from edgeship.program.chosen import row_sets
from edgeship.program.export import make_program

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vision_operators import nms

Tensor = torch.Tensor
# Output -> axis, for each set, and the output that counts.
Sets = list[tuple[dict[str, int], str]]


class Does(nn.Module):
    """A head of 12 numbers a row, then a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.head, self.other, self.function = nn.Linear(12, 12), nn.Linear(12, 12), function

    def forward(self, x: Tensor) -> Any:
        """[1, 30, 12]."""
        return self.function(self, self.head(x))


def plain(model: Does, x: Tensor) -> Any:
    """Nothing is chosen."""
    return {"a": x.softmax(-1), "b": x.sort(-1).values.sum(-1)}


def best(model: Does, x: Tensor) -> Any:
    """Boxes, scores and places of the best five."""
    scores, places = x[0, :, 4].topk(5)
    return {"boxes": x[0][places][:, :4] * 2, "scores": scores, "places": places, "all": x}


def two_choices(model: Does, x: Tensor) -> Any:
    """Two orders of other scores."""
    return {"a": x[0, :, 0].topk(5).values, "b": x[0, :, 1].topk(5).values, "c": x[0, :, 0].sort().values}


def in_one_tensor(model: Does, x: Tensor) -> Any:
    """As detectors without suppression end: best rows, then best classes of these, in one tensor."""
    boxes, scores = x.split([4, 8], -1)
    index = scores.amax(-1).topk(10)[1].unsqueeze(-1)
    boxes = boxes.gather(1, index.repeat(1, 1, 4))
    scores = scores.gather(1, index.repeat(1, 1, 8))
    best, flat = scores.flatten(1).topk(10)
    rows = torch.arange(1)[..., None]
    return {"rows": torch.cat([boxes[rows, flat // 8], best[..., None], (flat % 8)[..., None].float()], -1)}


def through_a_decoder(model: Does, x: Tensor) -> Any:
    """The best rows ask all others, as in a decoder whose queries are chosen."""
    places = x[..., 0].topk(6, 1)[1]
    asked = x.gather(1, places[..., None].expand(-1, -1, 12))
    seen = torch.nn.functional.scaled_dot_product_attention(asked[:, None], x[:, None], x[:, None])[:, 0]
    hidden = model.other(torch.nn.functional.layer_norm(asked + seen, (12,)))
    boxes, logits = hidden[..., :4].sigmoid(), (hidden @ hidden.new_ones(12, 3)).transpose(1, 2)
    return {"boxes": boxes, "logits": logits}


def detect(model: Does, x: Tensor) -> Any:
    """Above a score, suppressed."""
    sure = x[0, :, 4] > 0
    boxes, scores = x[0][sure][:, :4], x[0][sure][:, 4]
    kept = nms(boxes, scores, 0.5)[:7]
    return {"boxes": boxes[kept], "scores": scores[kept], "mean": x.mean(1)}


def filled_up(model: Does, x: Tensor) -> Any:
    """As an exporter of detectors has it: suppressed rows in one tensor, flat, filled up, and written into zeros."""
    made = x.new_zeros(1, 20, 5)
    sure = x[0, :, 4] > 0
    rows = x[0][sure][:, :5]
    rows = rows[nms(rows[:, :4], rows[:, 4], 0.5)[:20]]
    made[0] = torch.nn.functional.pad(rows.reshape(-1), (0, (20 - rows.shape[0]) * 5)).reshape(20, 5)
    return {"rows": made}


CASES: dict[Callable[..., Any], Sets] = {
    plain: [],
    best: [({"boxes": 0, "scores": 0, "places": 0}, "")],
    two_choices: [({"a": 0}, ""), ({"b": 0}, ""), ({"c": 0}, "")],
    in_one_tensor: [({"rows": 1}, "")],
    through_a_decoder: [({"boxes": 1}, ""), ({"logits": 2}, "")],
    filled_up: [({"rows": 1}, "")],
    detect: [({"boxes": 0, "scores": 0}, "count")],
}


@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_sets(function: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    program = make_program(Does(function), [TensorSpec("x", "f32", (1, 30, 12))], [torch.randn(1, 30, 12)])
    assert [(rows.axes, rows.count) for rows in row_sets(program)] == CASES[function]
