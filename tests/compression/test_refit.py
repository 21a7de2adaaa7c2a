import torch

from edgeship.compression.hessian import hessian_of
from edgeship.compression.prune import keep_mask, magnitude_score
from edgeship.compression.refit import refit_kept


def test_it_is_least_squares_on_what_is_kept():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 24, generator=generator)
    inputs = torch.randn(300, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    mask = keep_mask(magnitude_score(weight), 0.5, per_row=True)
    found = refit_kept(weight, mask, hessian_of([inputs], 24), damping=0.0, steps=60)
    assert not found[~mask].any()
    for row in range(5):
        exact = torch.linalg.lstsq(inputs[:, mask[row]].double(), (inputs @ weight[row]).double()).solution
        torch.testing.assert_close(found[row, mask[row]].double(), exact, rtol=1e-2, atol=1e-3)


def test_nothing_pruned_or_nothing_seen_leaves_the_weight_as_it_was():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    whole = torch.ones(4, 8, dtype=torch.bool)
    torch.testing.assert_close(refit_kept(weight, whole, hessian_of([torch.randn(20, 8)], 8)), weight)
    mask = keep_mask(magnitude_score(weight), 0.5)
    torch.testing.assert_close(refit_kept(weight, mask, hessian_of([torch.zeros(20, 8)], 8)), weight * mask)


def test_it_aims_at_what_the_float_model_has_where_the_inputs_drifted():
    generator = torch.Generator().manual_seed(2)
    weight, right = torch.randn(6, 12, generator=generator), torch.randn(400, 12, generator=generator)
    # As after a layer that lost weights: quieter, and mixed a little.
    drifted = 0.7 * right @ (torch.eye(12) + 0.1 * torch.randn(12, 12, generator=generator))
    mask = keep_mask(magnitude_score(weight), 0.3, per_row=True)
    hessian = hessian_of([drifted], 12, [right])
    error = [
        float(
            (
                right @ weight.T - drifted @ refit_kept(weight, mask, hessian, damping=0.0, drift=drift, steps=60).T
            ).norm()
        )
        for drift in (0.0, 0.5, 1.0)
    ]
    assert error[2] < error[1] < error[0]
    row, kept = 0, mask[0]
    exact = torch.linalg.lstsq(drifted[:, kept].double(), (right @ weight[row]).double()).solution
    found = refit_kept(weight, mask, hessian, damping=0.0, drift=1.0, steps=60)
    torch.testing.assert_close(found[row, kept].double(), exact, rtol=1e-2, atol=1e-3)
