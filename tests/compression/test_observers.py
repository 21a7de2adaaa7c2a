"""How ranges are chosen from what an observer saw."""

import numpy as np
import pytest
import torch

from edgeship.compression.observers import BINS, METHODS, Observer, choose_range
from edgeship.errors import UsageError


def seen(*tensors: torch.Tensor) -> Observer:
    observer = Observer()
    for tensor in tensors:
        observer.widen(tensor)
    for tensor in tensors:
        observer.count(tensor)
    return observer


def test_extremes_take_zero_in() -> None:
    observer = seen(torch.tensor([2.0, 3.0]))
    assert (observer.low, observer.high) == (0.0, 3.0)


def test_memory_does_not_grow_with_the_data() -> None:
    observer = seen(*(torch.randn(1000) for _ in range(20)))
    assert observer.counts is not None
    assert observer.counts.shape == (BINS,)
    assert observer.counts.sum() + observer.zeros == 20_000


def test_zeros_are_counted_apart() -> None:
    observer = seen(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert observer.zeros == 3
    assert observer.counts is not None
    assert observer.counts.sum() == 1


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_a_far_outlier_is_clipped_at_8_bits(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2_000_000, generator=generator)
    values[0] = 60.0
    low, high = choose_range(seen(values), method, 256, symmetric=False)
    # Entropy keeps what its bins tell apart (60 / 2048 each); the others come down to the bell's own tail.
    assert high < (30 if method == "entropy" else 20)
    assert low < -2
    assert choose_range(seen(values), "minmax", 256, symmetric=False)[1] == 60.0


def test_mse_is_no_worse_than_minmax_on_the_data_itself() -> None:
    values = torch.distributions.Laplace(0.0, 1.0).sample((50_000,))
    observer = seen(values)

    def error(method: str) -> float:
        low, high = choose_range(observer, method, 256, symmetric=False)
        scale = (high - low) / 255
        zero = round(-128 - low / scale)
        integers = (values / scale).round().add(zero).clamp(-128, 127)
        return float(((integers - zero) * scale - values).pow(2).mean())

    assert error("mse") < error("minmax")
    assert error("mse") < error("percentile")


def test_mse_keeps_the_whole_range_at_16_bits_without_outliers() -> None:
    values = torch.linspace(-1, 1, 10_000)
    low, high = choose_range(seen(values), "mse", 65536, symmetric=True)
    assert max(-low, high) > 0.98


def test_a_constant_is_covered_by_every_method() -> None:
    for method in METHODS:
        low, high = choose_range(seen(torch.full((100,), 5.0)), method, 256, symmetric=False)
        assert low == 0
        assert high == pytest.approx(5.0, rel=0.02)
        low, high = choose_range(seen(torch.full((100,), -5.0)), method, 256, symmetric=False)
        assert high == 0
        assert low == pytest.approx(-5.0, rel=0.02)


def test_zeros_alone_have_no_range() -> None:
    for method in METHODS:
        assert choose_range(seen(torch.zeros(10)), method, 256, symmetric=False) == (0, 0)


def test_unknown_method_and_entropy_for_16_bits_are_refused() -> None:
    with pytest.raises(UsageError, match="median"):
        choose_range(seen(torch.ones(2)), "median", 256, symmetric=False)
    with pytest.raises(UsageError, match="8 bits only"):
        choose_range(seen(torch.ones(2)), "entropy", 65536, symmetric=True)


def test_tiny_ranges_do_not_break_the_histogram() -> None:
    low, high = choose_range(seen(torch.tensor([1e-38, 1e-39])), "mse", 256, symmetric=False)
    assert np.isfinite([low, high]).all()
