"""What one grid cannot hold stays in float: joins of unlike parts, and what costs the outputs too much."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeship.compression.affine import quantize_nearest
from edgeship.compression.islands import WANTED_DB, decide_mixed, separate_joins
from edgeship.core.model import TensorSpec
from edgeship.core.weights import Affine
from edgeship.program.export import make_program
from edgeship.program.program import TorchProgram


class Head(nn.Module):
    """Large numbers and shares of 1 from one convolution each, brought together by ``after``."""

    def __init__(self, after: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.box, self.share = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.share.bias.data.fill_(-3)
        self.after = after

    def forward(self, x: torch.Tensor) -> Any:
        features = functional.relu(self.stem(x))
        return self.after(500 * torch.sigmoid(self.box(features)), torch.sigmoid(self.share(features)))


def program_of(module: nn.Module) -> TorchProgram:
    torch.manual_seed(0)
    return make_program(module.eval(), [TensorSpec("x", "f32", (1, 3, 8, 8))], [torch.rand(1, 3, 8, 8)])


def head(after: Callable[[torch.Tensor, torch.Tensor], Any]) -> TorchProgram:
    torch.manual_seed(0)
    return program_of(Head(after))


def batches(count: int = 6, size: float = 1.0) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [{"x": size * random.random((1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def ratios(program: TorchProgram, activations: Any, large: Callable[[np.ndarray], np.ndarray]) -> list[float]:
    """The worst sample's ratio, in dB, of the numbers that ``large`` picks of the output and of the others."""
    plain = program.module(quantized=False)
    rounded = dataclasses.replace(program, record=dataclasses.replace(program.record, activations=activations)).module()
    found = []
    for batch in batches():
        with torch.no_grad():
            wanted, made = (module(torch.from_numpy(batch["x"]))[0].numpy() for module in (plain, rounded))
        picked = large(np.ones_like(wanted)) > 0
        for chosen in (picked, ~picked):
            noise = float(np.square(wanted - made)[chosen].sum())
            found.append(10 * np.log10(float(np.square(wanted)[chosen].sum()) / max(noise, 1e-12)))
    return [min(found[0::2]), min(found[1::2])]


def first_channels(values: np.ndarray) -> np.ndarray:
    values[:, 4:] = 0
    return values


def assigned(box: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(1, 8, 4, 4)
    out[:, :4] = box
    out[:, 4:] = share
    return out


JOINS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], Any], Callable[[np.ndarray], np.ndarray]]] = {
    "cat": (lambda box, share: torch.cat([box, share], 1), first_channels),
    "nested": (lambda box, share: torch.cat([box, torch.cat([share[:, :2], share[:, 2:]], 1)], 1), first_channels),
    "flattened": (lambda box, share: torch.cat([box.flatten(2), share.flatten(2)], 1), first_channels),
    "stack": (
        lambda box, share: torch.stack([box, share], 1),
        lambda values: np.concatenate([values[:, :1], 0 * values[:, 1:]], 1),
    ),
    "shuffled": (
        lambda box, share: functional.pixel_shuffle(torch.cat([box[:, :1], share[:, :3]], 1), 2),
        lambda values: values * (np.indices(values.shape)[2:] % 2 == 0).all(0),
    ),
    "turned": (
        lambda box, share: torch.cat([box, share], 1).flatten(2).transpose(1, 2).reshape(1, 4, 4, 8),
        lambda values: np.concatenate([values[..., :4], 0 * values[..., 4:]], -1),
    ),
    "assigned": (assigned, first_channels),
    "padded": (
        lambda box, share: functional.pad(box, (0, 0, 0, 0, 0, 4)) + functional.pad(share, (0, 0, 0, 0, 4, 0)),
        first_channels,
    ),
}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("join", JOINS)
def test_each_part_keeps_what_it_would_alone(join, bits):
    after, large = JOINS[join]
    program = head(after)
    method = "mse" if bits == 8 else "minmax"
    found = decide_mixed(program, batches(), bits=bits, method=method)
    assert min(ratios(program, found.activations, large)) > WANTED_DB[bits] - 1
    assert found.floats
    # Everything before the join is in integers all the same.
    assert {"conv2d", "conv2d_1", "conv2d_2", "sigmoid", "sigmoid_1"} <= set(found.activations)


def test_parts_of_like_scale_share_a_grid():
    program = head(lambda box, share: torch.cat([box / 500, share], 1))
    found = decide_mixed(program, batches(), bits=8, method="minmax")
    assert found.floats == ()
    assert "cat" in found.activations


def test_a_join_that_only_layers_read_is_judged_by_the_outputs():
    assert (
        separate_joins(head(lambda box, share: (torch.cat([box, share], 1) * 0.01).mean((2, 3))), batches(), 8)
        == frozenset()
    )


class Unlike(nn.Module):
    """One layer whose channels differ ten thousand times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.out.weight.data[:2] *= 1e4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(functional.relu(self.conv(x)))


def test_channels_of_one_operator_are_measured_at_the_output():
    program = program_of(Unlike())
    found = decide_mixed(program, batches(), bits=8, method="minmax")
    assert found.floats == ("conv2d_1",)
    assert found.worst_db >= WANTED_DB[8]
    assert set(found.activations) == {"x", "conv2d", "relu"}


def test_samples_that_differ_more_than_a_grid_holds_leave_none():
    program = program_of(nn.Conv2d(3, 4, 3, bias=False))
    unlike = [*batches(3), *batches(3, 1e-3)]
    found = decide_mixed(program, unlike, bits=8, method="minmax")
    assert found.activations == {}
    assert decide_mixed(program, batches(6), bits=8, method="minmax").floats == ()


def test_where_products_take_integers_only_they_keep_their_grids():
    program = program_of(Unlike())
    uses = {use.name: use for use in program.record.inventory.weights}
    encoded = {
        name: quantize_nearest(program.weights[name].float(), Affine(8), axis=0, name=name)
        for name in ("conv.weight", "out.weight")
        if name in uses
    }
    program = dataclasses.replace(program, encoded=encoded)
    found = decide_mixed(program, batches(), bits=8, method="minmax", products=False)
    assert found.floats == ()
    assert found.worst_db < WANTED_DB[8]
    assert decide_mixed(program, batches(), bits=8, method="minmax").floats


@pytest.mark.parametrize("size", [90.0, 255.0])
def test_sixteen_bits_reach_for_probes_as_far_as_the_samples_allow(size):
    program = program_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    found = decide_mixed(program, batches(), bits=16, method="minmax", probes=batches(2, size))
    plain = decide_mixed(program, batches(), bits=16, method="minmax")
    wider = {name: found.activations[name].scale / plain.activations[name].scale for name in plain.activations}
    assert min(wider.values()) > 10
    assert max(wider.values()) <= 64.1
    assert found.worst_db >= WANTED_DB[16]


def test_a_probe_that_the_model_cannot_answer_is_left_out():
    class Power(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.exp(x)

    program = program_of(Power())
    found = decide_mixed(program, batches(), bits=16, method="minmax", probes=batches(1, 1e3))
    assert found.activations == decide_mixed(program, batches(), bits=16, method="minmax").activations
