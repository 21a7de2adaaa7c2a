"""Weights that cost the outputs most in few bits get more, and others do not."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeship.compression.encode import Encoder
from edgeship.compression.sensitive import DOMINATES, FEW_BYTES, find_sensitive
from edgeship.core.inventory import WeightUse
from edgeship.core.model import Signature, TensorSpec
from edgeship.core.weights import Affine, Encoding, Float
from edgeship.data.batches import generate_batches
from edgeship.data.tones import LOUDNESS, tones
from edgeship.program.export import make_program
from edgeship.program.program import TorchProgram


class Detector(nn.Module):
    """A short-time Fourier transform as a convolution, its logarithm, and layers behind it."""

    def __init__(self) -> None:
        super().__init__()
        window, place = torch.hann_window(128), torch.arange(128.0)
        turn = 2 * math.pi * torch.arange(65.0)[:, None] * place / 128
        self.basis = nn.Conv1d(1, 130, 128, 64, bias=False)
        self.basis.weight.data = torch.cat([turn.cos() * window, -turn.sin() * window])[:, None]
        self.layers = nn.Sequential(nn.Conv1d(65, 64, 3), nn.ReLU(), nn.Conv1d(64, 32, 3), nn.ReLU(), nn.Flatten())
        self.last = nn.Linear(32 * 3, 1)

    def forward(self, sound: torch.Tensor) -> torch.Tensor:
        real, imaginary = self.basis(sound[:, None]).chunk(2, 1)
        power = real.square() + imaginary.square()
        return torch.sigmoid(self.last(self.layers(torch.log(power + 1e-8))))


def program_of(module: nn.Module, *shape: int) -> TorchProgram:
    return make_program(module.eval(), [TensorSpec("x", "f32", shape)], [torch.randn(shape)])


def in_bits(program: TorchProgram, bits: int) -> dict[str, Encoding]:
    return {use.name: Affine(bits) for use in program.record.inventory.weights if use.op != "other"}


def to_float(use: WeightUse, encoding: Encoding) -> Encoding | None:
    return Float(16)


def worst_db(program: TorchProgram, encodings: dict[str, Encoding], batches: Any) -> float:
    encoded, _ = Encoder(program, encodings).encode()
    plain, rounded = program.module(), dataclasses.replace(program, encoded=encoded).module()
    found = []
    for batch in batches:
        with torch.no_grad():
            wanted, made = (module(torch.from_numpy(batch["x"]))[0].double() for module in (plain, rounded))
        noise = float((wanted - made).square().sum())
        found.append(10 * math.log10(float(wanted.square().sum()) / max(noise, 1e-20)))
    return min(found)


@pytest.fixture(scope="module")
def detector() -> TorchProgram:
    torch.manual_seed(0)
    return program_of(Detector(), 1, 512)


def test_a_basis_that_feeds_a_logarithm_keeps_more_bits(detector: TorchProgram) -> None:
    batches = tones(detector.signature, generate_batches(detector.signature, 6))
    wanted = in_bits(detector, 8)
    before = worst_db(detector, wanted, batches)
    found = find_sensitive(detector, wanted, to_float, batches, before + 6)
    assert list(found.kept) == ["basis.weight"]
    assert max(found.losses, key=found.losses.__getitem__) == "basis.weight"
    assert worst_db(detector, {**wanted, **found.kept}, batches) > before + 6
    assert found.before_db == pytest.approx(before, abs=3)


def test_tones_show_what_noise_hides(detector: TorchProgram) -> None:
    noise = generate_batches(detector.signature, 4)
    wanted = {"basis.weight": Affine(8)}
    on_noise = find_sensitive(detector, wanted, to_float, noise, 0)
    on_tones = find_sensitive(detector, wanted, to_float, tones(detector.signature, noise), 0)
    assert on_tones.losses["basis.weight"] > 3 * on_noise.losses["basis.weight"]


def test_tones_are_for_sounds_alone() -> None:
    for shape, sound in (
        ((1, 512), True),
        ((1, 1, 512), True),
        ((512,), True),
        ((1, 64), False),
        ((1, 80, 300), False),
    ):
        spec = TensorSpec("x", "f32", shape)
        batch = {"x": np.ones(shape, np.float32)}
        signature = Signature((spec,), ())
        (made,) = tones(signature, [batch])
        assert made["x"].shape == shape
        assert made["x"].dtype == np.float32
        assert (float(np.abs(made["x"]).max()) <= LOUDNESS) == sound


def test_layers_that_cost_alike_are_no_exceptions() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(int(1.5 / DOMINATES)) for layer in (nn.Linear(32, 32), nn.Tanh())]
    program = program_of(nn.Sequential(*layers[:-1]), 1, 32)
    found = find_sensitive(program, in_bits(program, 4), to_float, generate_batches(program.signature, 4), 60)
    assert len(found.losses) == len(layers) / 2
    assert len(found.kept) < len(layers) / 4


def test_what_is_good_enough_stays_as_it_is(detector: TorchProgram) -> None:
    found = find_sensitive(detector, in_bits(detector, 8), to_float, generate_batches(detector.signature, 4), 1)
    assert found.kept == {}
    assert set(found.losses) == set(in_bits(detector, 8))


def test_a_runtime_that_holds_nothing_wider_gets_nothing(detector: TorchProgram) -> None:
    batches = generate_batches(detector.signature, 2)
    assert find_sensitive(detector, in_bits(detector, 4), lambda use, encoding: None, batches, 60).kept == {}


def test_exceptions_stay_within_their_bytes() -> None:
    torch.manual_seed(0)
    program = program_of(nn.Sequential(nn.Linear(700, 700), nn.ReLU(), nn.Linear(700, 4)), 1, 700)
    batches = generate_batches(program.signature, 2)
    found = find_sensitive(program, in_bits(program, 4), to_float, batches, 60)
    assert FEW_BYTES < 700 * 700
    assert list(found.kept) == ["2.weight"]


class Steps(nn.Module):
    """A small layer in front of recurrent weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell = nn.Linear(16, 24), nn.GRU(24, 48, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.cell(torch.log(self.first(x).square() + 1e-4))[0]
        return answer


def test_weights_that_stay_in_float_leave_room_for_the_layer_before_them() -> None:
    torch.manual_seed(0)
    program = program_of(Steps(), 1, 10, 16)
    wanted = in_bits(program, 4)
    assert set(wanted) == {"first.weight", "cell.weight_ih_l0", "cell.weight_hh_l0"}
    wanted = {"first.weight": wanted["first.weight"]}
    found = find_sensitive(program, wanted, to_float, generate_batches(program.signature, 3), 40)
    assert list(found.kept) == ["first.weight"]


def test_a_model_without_inputs_to_measure_on_has_no_exceptions(detector: TorchProgram) -> None:
    assert find_sensitive(detector, in_bits(detector, 8), to_float, [], 60).losses == {}


class OfLengthOne(nn.Module):
    """Divides by the length, which silence has not: the model answers NaN to it, or what it writes in NaN's place."""

    def __init__(self, filled: bool) -> None:
        super().__init__()
        self.filled = filled
        self.layers = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer = self.layers(x / x.norm(dim=-1, keepdim=True))
        return answer.nan_to_num() if self.filled else answer


@pytest.mark.parametrize("filled", [False, True])
def test_inputs_that_make_nan_are_left_out(filled: bool) -> None:
    torch.manual_seed(0)
    program = program_of(OfLengthOne(filled), 1, 32)
    drawn = generate_batches(program.signature, 3)
    silence = {"x": np.zeros((1, 32), np.float32)}
    wanted = in_bits(program, 4)
    without = find_sensitive(program, wanted, to_float, drawn, 200.0)
    found = find_sensitive(program, wanted, to_float, [*drawn, silence], 200.0)
    assert found.losses == pytest.approx(without.losses)
    assert all(0 < loss < 1 for loss in found.losses.values())
