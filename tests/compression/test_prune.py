import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeship.compression.prune import keep_mask, magnitude_score, wanda_score
from edgeship.errors import EncodingError, UsageError


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 0.99), st.booleans())
def test_removes_exactly_the_share_asked_for_and_the_lowest_scores(seed, sparsity, per_row):
    score = torch.rand(6, 20, generator=torch.Generator().manual_seed(seed))
    mask = keep_mask(score, sparsity, per_row=per_row)
    groups = zip(score, mask, strict=True) if per_row else [(score.flatten(), mask.flatten())]
    assert int((~mask).sum()) == round(sparsity * score.numel())
    for values, kept in groups:
        assert abs(int((~kept).sum()) - sparsity * values.numel()) <= 1
        if kept.any() and not kept.all():
            assert values[kept].min() >= values[~kept].max()


def test_equal_scores_still_give_the_exact_share():
    assert int(keep_mask(torch.ones(4, 8), 0.5).sum()) == 16


@pytest.mark.parametrize("inputs", [1, 3, 5, 7])
def test_rows_of_few_inputs_lose_the_share_together(inputs):
    score = torch.rand(64, inputs, generator=torch.Generator().manual_seed(0))
    mask = keep_mask(score, 0.5, per_row=True)
    assert int((~mask).sum()) == 32 * inputs
    assert set((~mask).sum(1).tolist()) <= {inputs // 2, -(-inputs // 2)}


def test_two_of_four_keeps_the_two_best_of_every_four():
    score = torch.tensor([[4.0, 1, 3, 2, 0, 0, 5, 6]])
    assert keep_mask(score, 0.5, pattern="2:4").tolist() == [[True, False, True, False, False, False, True, True]]
    with pytest.raises(EncodingError, match="fours"):
        keep_mask(torch.ones(2, 6), 0.5, pattern="2:4")


def test_two_of_four_input_channels_of_a_convolution_at_every_place_of_its_kernel():
    score = torch.rand(3, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    kept = keep_mask(score, 0.5, pattern="2:4").reshape(3, 2, 4, 3, 3)
    assert set(kept.sum(2).flatten().tolist()) == {2}
    best = score.reshape(3, 2, 4, 3, 3).topk(2, dim=2).values.amin(2, keepdim=True)
    assert torch.equal(kept, score.reshape(3, 2, 4, 3, 3) >= best)


def test_wanda_agrees_with_its_formula():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(5, 12, generator=generator), torch.randn(40, 12, generator=generator)
    score = wanda_score(weight, inputs.norm(dim=0)).numpy()
    plain = np.abs(weight.numpy()) * np.sqrt((inputs.numpy() ** 2).sum(0))[None, :]
    np.testing.assert_allclose(score, plain, rtol=1e-5)
    mask = keep_mask(torch.from_numpy(score), 0.5, per_row=True).numpy()
    for row in range(5):
        assert set(np.flatnonzero(mask[row])) == set(np.argsort(plain[row])[6:])


def test_a_share_of_everything_is_refused():
    with pytest.raises(UsageError):
        keep_mask(magnitude_score(torch.ones(2, 2)), 1.0)
