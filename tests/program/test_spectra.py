"""Fourier transforms and complex numbers leave the normal form, and the answers are torch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeship.core.model import TensorSpec
from edgeship.program.export import make_program


class Of(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def answers(function, x):
    """The program's answers; nothing in it is complex."""
    made = make_program(Of(function), [TensorSpec("x", "f32", tuple(x.shape))], [x])
    for node in made.exported.graph.nodes:
        value = node.meta.get("val")
        assert not (isinstance(value, torch.Tensor) and value.is_complex()), node
    return made.exported.module()(x)


def decibels(want, have):
    return float(
        10 * torch.log10(want.double().square().sum() / (want - have).double().square().sum().clamp(min=1e-30))
    )


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([16, 25, 64]), st.integers(3, 20), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(["hann", "short", None]), st.sampled_from(["abs", "power", "parts", "real"]),
)  # fmt: skip
def test_short_time_transforms(length, hop, center, normalized, onesided, window, what):
    made = {"hann": torch.hann_window(length), "short": torch.hamming_window(length - 7), None: None}[window]

    def spectrum(x):
        found = torch.stft(
            x, length, hop, win_length=None if made is None else made.numel(), window=made, center=center,
            normalized=normalized, onesided=onesided, return_complex=True,
        )  # fmt: skip
        if what == "abs":
            return found.abs()
        if what == "power":
            return found.transpose(1, 2).abs() ** 2
        return torch.view_as_real(found) if what == "parts" else found.real + 2 * found.imag

    x = torch.randn(2, 150)
    assert decibels(spectrum(x), answers(spectrum, x)[0]) > 100


CASES = {
    "one_axis": lambda x: torch.fft.rfft(x).abs(),
    "padded": lambda x: torch.fft.rfft(x, n=20, norm="ortho").real,
    "cut": lambda x: torch.fft.fft(x, n=7, dim=0).imag,
    "of_complex": lambda x: torch.fft.fft(torch.fft.rfft(x), dim=0).abs(),
    "there_and_back": lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(x.flip(1)), n=12),
    "back_odd": lambda x: torch.fft.irfft(torch.fft.rfft(x), n=11),
    "rotations": lambda x: torch.view_as_real(
        torch.view_as_complex(x.reshape(5, 6, 2)) * torch.polar(torch.ones(6), torch.arange(6.0))
    ).flatten(1),
    "phase": lambda x: torch.fft.rfft(x).angle(),
    "quotient": lambda x: (torch.fft.rfft(x) / (torch.fft.rfft(x.flip(1)) + 3)).abs(),
    "conjugate": lambda x: (torch.fft.rfft(x) * torch.fft.rfft(x).conj()).real,
}


@pytest.mark.parametrize("name", CASES)
def test_arithmetic_on_complex_numbers(name):
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    assert decibels(CASES[name](x), answers(CASES[name], x)[0]) > 100


def test_a_basis_is_no_trained_weight():
    x = torch.randn(1, 64)
    made = make_program(
        Of(lambda x: torch.stft(x, 16, window=torch.hann_window(16), return_complex=True).abs()),
        [TensorSpec("x", "f32", (1, 64))], [x],
    )  # fmt: skip
    assert [use.op for use in made.record.inventory.weights] == ["other"]
