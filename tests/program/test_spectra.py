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
    "both_axes": lambda x: torch.fft.fft2(x, norm="ortho").abs(),
    "cut_and_padded": lambda x: torch.fft.fft2(x, s=(4, 15)).imag,
    "real_axes_and_back": lambda x: torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho") * 2, s=(5, 12), norm="ortho"),
    "all_axes": lambda x: torch.fft.rfftn(x, dim=(1, 0)).abs() + torch.fft.rfftn(x, s=(12, 5), dim=(1, 0)).imag,
    "and_back": lambda x: torch.fft.irfftn(torch.fft.rfftn(x), s=(5, 12), norm="forward"),
    "inverse": lambda x: torch.fft.ifft(torch.fft.fft(x, dim=0), dim=0, norm="forward").real,
    "inverse_axes": lambda x: torch.fft.ifft2(torch.complex(x, x.flip(1))).imag,
    "inverse_ortho": lambda x: torch.fft.ifftn(x, norm="ortho").real,
    "hermitian": lambda x: torch.fft.hfft(torch.complex(x, x.flip(0)), n=9) + torch.fft.ihfft(x[:, :16]).real[:, :1],
    "to_the_middle": lambda x: torch.fft.ifftshift(torch.fft.fftshift(torch.fft.fft(x)) * x, dim=1).real,
    "sums": lambda x: torch.einsum("ab,cb->ac", torch.fft.rfft(x), torch.fft.rfft(x.flip(1))).imag,
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


TRANSFORMS = ("fft2", "ifft2", "rfft2", "fftn", "ifftn", "rfftn", "irfft2", "irfftn", "hfft", "ihfft", "ifft")


@settings(max_examples=4, deadline=None)
@given(st.sampled_from([None, "ortho", "forward"]), st.integers(2, 7), st.integers(2, 7), st.booleans())
def test_transforms_of_every_name(norm, high, wide, sized):
    def run(x):
        """All at once: an export takes longer than a transform."""
        found = []
        for name in TRANSFORMS:
            given = torch.complex(x, x.flip(0)) if name in ("irfft2", "irfftn", "hfft", "ifft", "ifft2") else x
            sizes = (high, wide) if name[-1] in "2n" else wide
            sizes = sizes if sized or name[0] in "ih" else None
            made = getattr(torch.fft, name)(given, sizes, norm=norm)
            found += [made.real, made.imag] if made.is_complex() else [made]
        return tuple(found)

    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
    for wanted, found in zip(run(x), answers(run, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# Torch itself cannot trace the way back of an odd length.
@settings(max_examples=5, deadline=None)
@given(
    st.sampled_from([16, 24, 30]), st.sampled_from([2, 3, 4]), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from([None, 100, 150]),
)  # fmt: skip
def test_short_time_transforms_and_back(length, share, normalized, onesided, many, samples):
    window = torch.hann_window(length)
    said = {"hop_length": length // (2 * share) or 1, "window": window, "normalized": normalized, "onesided": onesided}

    def run(x):
        found = torch.stft(x, length, return_complex=True, **said)
        return torch.istft(found * 0.5, length, length=samples, **said)

    x = torch.randn((2, 120) if many else (120,), generator=torch.Generator().manual_seed(3))
    assert decibels(run(x), answers(run, x)[0]) > 95


class Operator(torch.nn.Module):
    """A layer of a Fourier neural operator, as everybody writes it: low frequencies are written into zeros."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Parameter(torch.randn(3, 4, 2, 2, dtype=torch.cfloat))
        self.last = torch.nn.Parameter(torch.randn(3, 4, 2, 2, dtype=torch.cfloat))

    def forward(self, x):
        found = torch.fft.rfft2(x)
        out = torch.zeros(x.shape[0], 4, x.size(-2), x.size(-1) // 2 + 1, dtype=torch.cfloat)
        out[:, :, :2, :2] = torch.einsum("bixy,ioxy->boxy", found[:, :, :2, :2], self.first)
        out[:, :, -2:, :2] = torch.einsum("bixy,ioxy->boxy", found[:, :, -2:, :2], self.last)
        return torch.fft.irfft2(out, s=(x.size(-2), x.size(-1)))


def test_a_fourier_neural_operator():
    torch.manual_seed(0)
    module, x = Operator(), torch.randn(1, 3, 8, 9)
    assert decibels(module(x).detach(), answers(module, x)[0]) > 95
