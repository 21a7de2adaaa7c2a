import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeship.compression.palette import palettize
from edgeship.core.weights import Palette
from edgeship.errors import EncodingError


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 6, 8]), st.sampled_from([None, 4]), st.integers(0, 2**31))
def test_every_weight_takes_its_nearest_entry_and_tables_are_float16(bits, group, seed):
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(seed))
    made = palettize(weight, Palette(bits, group))
    assert made.table.shape == ((1 if group is None else 2), 1 << bits)
    np.testing.assert_array_equal(made.table, made.table.astype(np.float16).astype(np.float32))
    table = np.repeat(made.table, 8 // made.table.shape[0], axis=0)
    best = np.abs(weight.numpy()[:, :, None] - table[:, None, :]).min(-1)
    np.testing.assert_allclose(np.abs(weight.numpy() - made.dequantize()), best, atol=1e-6)


def test_few_distinct_values_are_stored_exactly():
    weight = torch.tensor([0.5, -1.0, 2.0, 0.25])[
        torch.randint(0, 4, (8, 16), generator=torch.Generator().manual_seed(1))
    ]
    np.testing.assert_array_equal(palettize(weight, Palette(2)).dequantize(), weight.numpy())


def test_tables_serve_the_tails_of_trained_weights_too():
    """Within 8 % of the best of many random starts (k-means++), on weights with heavy tails."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 512, generator=generator) / torch.rand(8, 512, generator=generator).clamp(min=0.1).sqrt()
    made = torch.from_numpy(palettize(weight, Palette(4)).dequantize())
    best = min(_random_start(weight.flatten(), 16, generator) for _ in range(20))
    assert float((made - weight).square().sum()) < 1.08 * best


def _random_start(values, entries, generator):
    """Squared error of plain k-means from a random start."""
    centers = values[torch.randint(len(values), (1,), generator=generator)]
    while len(centers) < entries:
        far = (values[:, None] - centers).square().amin(1)
        centers = torch.cat([centers, values[torch.multinomial(far, 1, generator=generator)]])
    for _ in range(60):
        nearest = (values[:, None] - centers).abs().argmin(1)
        centers = torch.stack(
            [values[nearest == i].mean() if (nearest == i).any() else centers[i] for i in range(entries)]
        )
    return float((values[:, None] - centers).square().amin(1).sum())


def test_importance_moves_the_table_to_what_matters():
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    importance = torch.where(weight > 1, 100.0, 1.0)
    plain, weighted = palettize(weight, Palette(3)), palettize(weight, Palette(3), importance=importance)
    error = [float(((torch.from_numpy(m.dequantize()) - weight) ** 2 * importance).sum()) for m in (plain, weighted)]
    assert error[1] < 0.7 * error[0]


def test_the_same_weight_gives_the_same_bits():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    one, other = palettize(weight, Palette(4)), palettize(weight.clone(), Palette(4))
    assert one.indices.tobytes() == other.indices.tobytes()
    assert one.table.tobytes() == other.table.tobytes()


def test_constant_and_ragged_weights():
    np.testing.assert_array_equal(palettize(torch.zeros(4, 8), Palette(4)).dequantize(), np.zeros((4, 8)))
    with pytest.raises(EncodingError, match="do not divide"):
        palettize(torch.ones(6, 8), Palette(4, 4))
