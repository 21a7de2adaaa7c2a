import time

import numpy as np
import pytest
import torch
from torch import nn

from edgeship.compression import forecast as module
from edgeship.compression.encode import Encoder
from edgeship.compression.forecast import Forecast, Progress, forecast, human_seconds, product_rate
from edgeship.core.encodings import ENCODED_OPS, encoding_named, fitted
from edgeship.core.model import TensorSpec
from edgeship.program.export import make_program


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.picture, self.inner, self.outer = nn.Conv2d(3, 8, 3), nn.Linear(width, 2 * width), nn.Linear(2 * width, 8)

    def forward(self, x):
        h = self.picture(x).flatten(2)
        return self.outer(torch.relu(self.inner(h)))


def made(width=36):
    torch.manual_seed(0)
    side = int(width**0.5) + 2
    program = make_program(
        Net(width).eval(), [TensorSpec("x", "f32", (1, 3, side, side))], [torch.randn(1, 3, side, side)]
    )
    batch = {"x": np.zeros((1, 3, side, side), np.float32)}
    wanted = {
        use.name: fitted(encoding_named("int4-g32"), use)
        for use in program.record.inventory.weights
        if use.op in ENCODED_OPS
    }
    return program, batch, wanted


def test_products_are_counted_from_the_shapes():
    program, batch, wanted = made()
    # At one multiplication a second seconds are multiplications.
    found = forecast(program, [batch], wanted, "awq", rate=1.0)
    convolution, inner = 36 * 8 * 27, 8 * 36 * 72
    # A batch costs what leads to a layer and half of its Hessian; nothing is run behind the last one.
    wanted_products = [36 * 27**2 / 2, convolution + 8 * 36**2 / 2, inner + 8 * 72**2 / 2]
    assert [each / (1 + module.AROUND) for each in found.running] == pytest.approx(wanted_products)
    beside = forecast(program, [batch], wanted, "gptq", rate=1.0)
    # The float model runs beside it, and the drift is a whole matrix.
    doubled = [36 * 27**2 * 1.5, 2 * convolution + 8 * 36**2 * 1.5, 2 * inner + 8 * 72**2 * 1.5]
    assert [each / (1 + module.AROUND) for each in beside.running] == pytest.approx(doubled)
    assert sum(beside.rounding) > sum(found.rounding) > 0
    nothing = forecast(program, [batch], {}, "gptq", rate=1.0)
    assert sum(nothing.rounding) == 0


def test_memory_grows_with_the_batches_up_to_what_is_held():
    program, batch, wanted = made()
    found = forecast(program, [batch], wanted, "gptq", rate=1.0)
    # What waits in front of the last layer, twice: (1, 8, 72) numbers.
    assert found.held == 2 * 4 * 8 * 72
    assert found.memory_bytes(10) - found.memory_bytes(5) == 5 * found.held
    assert found.memory_bytes(1 << 30) == found.now + module.HELD_BYTES + found.layer
    assert found.now > 1 << 20


def test_a_time_buys_batches():
    found = Forecast((1.0, 2.0), (0.25, 0.25), 0, 0, 0)
    assert found.seconds(4) == 5
    assert found.batches_within(5) == 4
    assert found.batches_within(4.9) == 3
    assert found.batches_within(2) == 0
    assert found.shares(4) == pytest.approx([1 / 5, 3 / 5])


def test_progress_says_what_is_left_and_believes_the_pace_more_and_more(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    heard = []
    told = Progress(Forecast((10.0,) * 4, (0.0,) * 4, 0, 0, 0), 1, lambda *said: heard.append(said))
    for done in range(4):
        told(done, 4, "layer")
        # Twice as slow as foreseen.
        now[0] += 20
    told(4, 4, "end")
    assert heard == [
        (0, 4, "layer, 40 s left"),
        (1, 4, "layer, 38 s left"),
        (2, 4, "layer, 30 s left"),
        (3, 4, "layer, 18 s left"),
        (4, 4, "end"),
    ]


def test_times_are_written_for_people():
    assert [human_seconds(value) for value in (0.2, 99, 100, 3000, 7200)] == ["1 s", "99 s", "2 min", "50 min", "2.0 h"]
    assert product_rate() > 1e8


def test_the_order_is_that_of_the_walk():
    program, batch, wanted = made()
    heard = []
    encoder = Encoder(program, wanted, "gptq", progress=lambda done, total, what: heard.append((done, total, what)))
    encoder.encode([batch, {"x": np.ones_like(batch["x"])}])
    found = forecast(program, [batch], wanted, "gptq", rate=1.0)
    walked = [item for item in heard if item[1] == len(found.running)]
    assert len(walked) >= len(found.running) == 3
