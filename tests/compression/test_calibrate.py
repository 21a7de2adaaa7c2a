"""Static grids decided on a program: who gets one, who shares one, and what data is refused."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeship.compression.affine import quantize_nearest
from edgeship.compression.calibrate import CLIP_SHARE, HEADROOM, MIN_SCALE, REACH, decide_activations, encode_range
from edgeship.compression.grids import clip_bounds, shared_grids
from edgeship.core.model import TensorSpec
from edgeship.core.weights import ActivationEncoding, Affine
from edgeship.data.batches import generate_batches
from edgeship.errors import DataError, UsageError
from edgeship.program.export import make_program
from edgeship.program.program import TorchProgram


class Net(nn.Module):
    def __init__(self, after: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.after = after

    def forward(self, x: torch.Tensor) -> Any:
        return self.after(self.conv(x))


@functools.cache
def program_of(after: Callable[[torch.Tensor], Any]) -> TorchProgram:
    torch.manual_seed(0)
    return make_program(Net(after), [TensorSpec("x", "f32", (1, 3, 8, 8))], [torch.randn(1, 3, 8, 8)])


def decide(program: TorchProgram, **options: Any) -> dict[str, ActivationEncoding]:
    return decide_activations(program, generate_batches(program.signature, 3), **options)


def test_every_float_value_from_input_to_output_has_a_grid() -> None:
    program = program_of(lambda x: functional.relu(x).mean((2, 3)))
    assert list(decide(program)) == ["x", "conv2d", "relu", "mean"]


def test_weights_and_biases_have_none_but_constants_in_arithmetic_do() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.place = nn.Parameter(torch.randn(1, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + self.place

    program = make_program(Shifted(), [TensorSpec("x", "f32", (1, 4))], [torch.randn(1, 4)])
    assert set(decide(program)) == {"p_place", "x", "linear", "add"}


@pytest.mark.parametrize(
    "after",
    [
        lambda x: functional.max_pool2d(x, 2),
        lambda x: functional.avg_pool2d(x, 2),
        lambda x: x.flatten(1),
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: functional.pad(x, (1, 1, 1, 1)),
        lambda x: x[:, :, ::2, ::2],
        lambda x: functional.interpolate(x, scale_factor=2, mode="bilinear"),
    ],
)
def test_moving_operators_keep_the_grid(after: Callable[[torch.Tensor], torch.Tensor]) -> None:
    decided = decide(program_of(after), method="minmax")
    del decided["x"]
    assert len(decided) >= 2
    assert len(set(decided.values())) == 1


def test_both_sides_of_a_split_and_a_concatenation_share_one_grid() -> None:
    def after(x: torch.Tensor) -> torch.Tensor:
        first, second = x.split(4, 1)
        return torch.cat([first * 2, second], 1)

    decided = decide(program_of(after))
    assert decided["cat"] == decided["mul"] == decided["conv2d"]
    assert decided["cat"] != decided["x"]


def test_an_average_over_everything_has_its_own_narrow_grid() -> None:
    decided = decide(program_of(lambda x: functional.adaptive_avg_pool2d(x, 1)), method="minmax")
    mean = next(encoding for name, encoding in decided.items() if name not in ("x", "conv2d"))
    assert mean.scale < decided["conv2d"].scale / 2


def test_the_input_of_a_relu_takes_its_grid_and_nothing_changes() -> None:
    program = program_of(functional.relu)
    decided = decide(program, method="minmax")
    assert decided["conv2d"] == decided["relu"]
    assert decided["relu"].zero_point == -128
    x = torch.randn(1, 3, 8, 8)
    alone = {name: encoding for name, encoding in decided.items() if name != "conv2d"}

    def answer(activations: dict[str, ActivationEncoding]) -> torch.Tensor:
        record = dataclasses.replace(program.record, activations=activations)
        with torch.no_grad():
            return dataclasses.replace(program, record=record).module()(x)[0]

    assert torch.equal(answer(decided), answer(alone))


def test_a_value_that_others_read_too_keeps_its_negatives() -> None:
    decided = decide(program_of(lambda x: x + functional.relu(x)), method="minmax")
    assert decided["conv2d"] != decided["relu"]
    assert decided["conv2d"].zero_point > -128


def test_bounded_functions_have_fixed_grids() -> None:
    eight = decide(program_of(lambda x: (torch.softmax(x, 1), torch.sigmoid(x), torch.tanh(x))))
    assert eight["softmax"] == eight["sigmoid"] == ActivationEncoding(8, 1 / 256, -128)
    assert eight["tanh"] == ActivationEncoding(8, 1 / 128, 0)
    sixteen = decide(program_of(torch.sigmoid), bits=16, method="minmax")
    assert sixteen["sigmoid"] == ActivationEncoding(16, 1 / 32768, 0)


def test_a_bounded_value_does_not_drag_a_concatenation_into_its_range() -> None:
    decided = decide(program_of(lambda x: torch.cat([torch.sigmoid(x), x * 10], 1)), method="minmax")
    assert decided["sigmoid"].scale == 1 / 256
    assert decided["cat"] == decided["mul"]
    assert decided["cat"].scale > 1 / 256


def test_16_bits_are_symmetric() -> None:
    decided = decide(program_of(functional.relu), bits=16, method="minmax")
    assert {encoding.zero_point for encoding in decided.values()} == {0}
    assert {encoding.bits for encoding in decided.values()} == {16}


def test_scales_are_on_the_float16_grid_and_cover_the_range() -> None:
    generator = np.random.default_rng(0)
    for low, high in generator.normal(0, 3, (200, 2)):
        encoding = encode_range(low, high, 8)
        low, high = min(low, 0.0), max(high, 0.0)
        assert encoding.scale == float(np.float16(encoding.scale))
        assert (encoding.low - encoding.zero_point) * encoding.scale <= low + encoding.scale
        assert (encoding.high - encoding.zero_point) * encoding.scale >= high - encoding.scale
        wide = encode_range(low, high, 16)
        assert wide.scale == float(np.float32(wide.scale))
        assert 32767 * wide.scale >= max(-low, high)


def test_a_tiny_range_keeps_a_normal_float16_scale() -> None:
    assert encode_range(0, 1e-6, 8).scale == MIN_SCALE
    assert encode_range(0, 1e-6, 16).scale < MIN_SCALE


def test_nothing_seen_has_a_fine_grid() -> None:
    assert encode_range(0.0, 0.0, 8).scale == MIN_SCALE
    assert encode_range(0.0, 0.0, 16).scale == MIN_SCALE / 2**16


def test_16_bits_reach_beyond_what_was_seen() -> None:
    data = generate_batches(program_of(torch.tanh).signature, 3)
    decided = decide(program_of(torch.tanh), bits=16, method="minmax")
    seen = max(float(np.abs(batch["x"]).max()) for batch in data)
    assert HEADROOM * seen <= 32767 * decided["x"].scale < 1.01 * HEADROOM * seen


def test_scores_in_16_bits_need_not_reach_their_mask() -> None:
    mask = torch.zeros(8, 8)
    mask[:, 4:] = -1000.0

    def scored(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x + mask, -1)

    program = program_of(scored)
    decided = decide(program, bits=16, method="minmax")
    assert HEADROOM * REACH <= 32767 * decided["add"].scale < HEADROOM * (REACH + 20)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    record = dataclasses.replace(program.record, activations=decided)
    with torch.no_grad():
        (wanted,), (found,) = program.module()(x), dataclasses.replace(program, record=record).module()(x)
    assert float(found[..., 4:].max()) == 0
    assert float((found - wanted).abs().max()) < 1e-3
    # Through a view too: both have one grid.
    viewed = program_of(lambda x: torch.softmax((x + mask).reshape(1, 8, 64), -1))
    assert 32767 * decide(viewed, bits=16, method="minmax")["add"].scale < HEADROOM * (REACH + 20)
    # In eight bits the mask stays on the grid, as the data showed it.
    assert decide(program, method="minmax")["add"].scale > 1


def test_rows_that_no_data_looked_up_are_on_the_grid() -> None:
    table = nn.Embedding(9, 4)
    with torch.no_grad():
        table.weight[8] = 100.0
    program = make_program(table, [TensorSpec("ids", "i64", (1, 3), low=0, high=8)], [torch.tensor([[1, 2, 3]])])
    data = [{"ids": np.array([[1, 2, 3]])}]
    for method in ("minmax", "percentile", "mse"):
        decided = decide_activations(program, data, bits=16, method=method)
        assert 32767 * decided["embedding"].scale >= 100.0
    assert 255 * decide_activations(program, data, method="minmax")["embedding"].scale < 10.0


@pytest.mark.parametrize("bits", [8, 16])
def test_what_no_data_reached_keeps_the_range_of_what_it_is_made_from(bits: int) -> None:
    program = program_of(lambda x: torch.relu(x[:, :1] - 1e6) * x)
    decided = decide(program, bits=bits, method="minmax")
    reach = decided["conv2d"].high * decided["conv2d"].scale
    assert decided["mul"].high * decided["mul"].scale >= 0.9 * reach


CONSTANTS: dict[float, Callable[[torch.Tensor], torch.Tensor]] = {
    3.0: lambda x: x * 0 + 3.0,
    -3.0: lambda x: x * 0 - 3.0,
    0.0: lambda x: x * 0,
}


@pytest.mark.parametrize("value", list(CONSTANTS))
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_a_constant_activation_comes_out_right(value: float, bits: int, method: str) -> None:
    program = program_of(CONSTANTS[value])
    decided = decide(program, bits=bits, method=method)
    record = dataclasses.replace(program.record, activations=decided)
    with torch.no_grad():
        (found,) = dataclasses.replace(program, record=record).module()(torch.randn(1, 3, 8, 8))
    assert all(encoding.scale > 0 for encoding in decided.values())
    torch.testing.assert_close(found, torch.full_like(found, value), rtol=2e-3, atol=1e-6)


def test_rows_of_an_int8_table_pass_unchanged() -> None:
    program = make_program(
        nn.Embedding(9, 4), [TensorSpec("ids", "i64", (1, 3), low=0, high=8)], [torch.tensor([[1, 2, 3]])]
    )
    encoding = Affine(8, granularity="tensor")
    table = quantize_nearest(program.weight("weight"), encoding)
    record = dataclasses.replace(program.record, encodings={"weight": encoding})
    program = dataclasses.replace(program, encoded={"weight": table}, record=record)
    scale = float(table.scale.reshape(()))
    assert decide(program)["embedding"] == ActivationEncoding(8, scale, 0)
    assert decide(program, bits=16, method="minmax")["embedding"] == ActivationEncoding(16, scale / 256, 0)


def test_quantized_answers_stay_near_the_float_ones() -> None:
    program = program_of(lambda x: functional.max_pool2d(functional.relu(x), 2).flatten(1))
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        (wanted,) = program.module()(x)
        for bits, method, limit in ((8, "mse", 30), (8, "percentile", 30), (16, "minmax", 70)):
            record = dataclasses.replace(program.record, activations=decide(program, bits=bits, method=method))
            (found,) = dataclasses.replace(program, record=record).module()(x)
            ratio = 10 * torch.log10(wanted.pow(2).mean() / (wanted - found).pow(2).mean())
            assert ratio > limit, (bits, method)


def test_two_runs_decide_the_same() -> None:
    program = program_of(functional.gelu)
    for method in ("minmax", "percentile", "mse", "entropy"):
        assert decide(program, method=method) == decide(program, method=method)


def test_every_node_is_in_one_grid() -> None:
    program = program_of(lambda x: torch.cat([functional.relu(x), x.flip(1)], 1).mean(1))
    names = [name for grid in shared_grids(program.exported) for name in grid.nodes]
    assert len(names) == len(set(names))
    assert set(names) == set(decide(program))


def batch(**arrays: Any) -> list[dict[str, Any]]:
    return [arrays]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "empty"),
        (batch(y=np.zeros((1, 3, 8, 8), np.float32)), "has y"),
        (batch(x=np.zeros((1, 3, 8, 9), np.float32)), r"\[1, 3, 8, 9\]"),
        (batch(x=np.zeros((1, 3, 8, 8), np.float64)), "float64"),
        (batch(x=np.full((1, 3, 8, 8), np.nan, np.float32)), "NaN or infinity"),
        (batch(x=np.full((1, 3, 8, 8), np.inf, np.float32)), "NaN or infinity"),
    ],
)
def test_unfit_data_is_refused(batches: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        decide_activations(program_of(functional.relu), batches)


def test_an_infinity_made_inside_names_the_activation() -> None:
    program = program_of(torch.exp)
    data = batch(x=np.full((1, 3, 8, 8), 1e4, np.float32))
    with pytest.raises(DataError, match="activation exp is not finite"):
        decide_activations(program, data)


def test_unknown_bits_and_methods_are_refused() -> None:
    program = program_of(functional.relu)
    with pytest.raises(UsageError, match="4 bits"):
        decide(program, bits=4)
    with pytest.raises(UsageError, match="median"):
        decide(program, method="median")


def test_progress_counts_both_sweeps() -> None:
    calls: list[tuple[int, int]] = []
    decide(program_of(functional.relu), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 6) for i in range(1, 7)]


def test_a_grid_that_ends_at_a_clip_ends_within_it() -> None:
    draw = np.random.default_rng(0)
    given_up = 0
    for _ in range(4000):
        high = float(draw.exponential() * 10.0 ** draw.integers(-2, 3) + 1e-2)
        low = -high * float(draw.choice([0.0, 0.0, draw.random(), draw.exponential()]))
        # What data reach of it: all, nearly all, or too little for the clip to matter.
        seen = (low * float(draw.choice([1.0, 0.5])), high * float(draw.choice([1.0, 0.9999, 0.3])))
        grid, covering = encode_range(*seen, 8, (low, high)), encode_range(*seen, 8)
        ends = [(limit - grid.zero_point) * grid.scale for limit in (grid.low, grid.high)]
        assert float(np.float16(grid.scale)) == grid.scale
        assert grid.scale >= covering.scale * CLIP_SHARE * (1 - 2**-10)
        within = low <= ends[0] <= 0 <= ends[1] <= high
        assert within or grid == covering
        # ReLU6 and its kind always end within.
        assert within or low < 0 or high < 256 * MIN_SCALE
        given_up += not within
        assert encode_range(2 * low - 1, 2 * high, 8, (low, high)) == encode_range(2 * low - 1, 2 * high, 8)
    assert given_up < 400


def test_clips_are_read_with_their_bounds() -> None:
    class Clips(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (
                functional.relu(x), functional.relu6(x), functional.hardtanh(x), functional.hardtanh(x, -2, 3),
                x.clamp(0.5, 4), x.clamp(min=-1), x.clamp(max=2), torch.clamp_min(x, 1), torch.sigmoid(x),
            )  # fmt: skip

    program = torch.export.export(Clips(), (torch.randn(3),))
    inf = math.inf
    found = [clip_bounds(node) for node in program.graph.nodes if node.op == "call_function"]
    assert found == [
        (0, inf), (0, 6), (-1, 1), (-2, 3), (0.5, 4), (-1, inf), (-inf, 2), (1, inf), (-inf, inf),
    ]  # fmt: skip
