"""compress/prune: only when asked for, exactly the share, in every scope."""

import pytest

from edgeship.core.passes import Context, Skip
from edgeship.errors import DataError, UsageError
from edgeship.passes.compress.prune import PruneWeights
from edgeship.program.program import TorchProgram, read_record

PRUNED = ("0.weight", "2.weight", "6.weight", "8.weight", "10.weight")


def zeros(model):
    program = TorchProgram.open(model)
    total = sum(program.weights[name].numel() for name in PRUNED)
    return sum(int((program.weights[name] == 0).sum()) for name in PRUNED) / total


def test_nothing_is_pruned_that_nobody_asked_for(request_for):
    assert isinstance(PruneWeights.plan(request_for()), Skip)
    assert isinstance(PruneWeights.plan(request_for(options={"compress/prune": {"sparsity": 0.5}})), PruneWeights)


@pytest.mark.parametrize("scope", ["layer", "global", "measured"])
def test_the_share_is_what_was_asked_for(scope, saved, calibration, tmp_path):
    step = PruneWeights(sparsity=0.5, scope=scope, data=calibration, samples=8)
    model = step.run(saved, Context(tmp_path))
    step.ensures(model, model=saved)
    assert zeros(model) == pytest.approx(0.5, abs=0.02)
    shares = read_record(model).pruned
    assert (len({round(share, 2) for share in shares.values()}) > 1) == (scope != "layer")
    assert zeros(saved) == 0


def test_two_of_four_leaves_two_of_every_four(saved, tmp_path):
    model = PruneWeights(pattern="2:4").run(saved, Context(tmp_path))
    rows = (TorchProgram.open(model).weights["6.weight"] != 0).reshape(-1, 4).sum(1)
    assert set(rows.tolist()) == {2}


def test_wanda_agrees_with_its_formula(saved, calibration, tmp_path):
    import numpy as np
    import torch

    from edgeship.data.batches import load_batches

    model = PruneWeights(method="wanda", data=calibration, samples=48).run(saved, Context(tmp_path))
    program = TorchProgram.open(saved)
    weights = dict(program.weights.items())
    given = load_batches(calibration.reference, program.signature, part="calibration")
    images = torch.from_numpy(np.concatenate([batch["image"] for batch in given]))
    x = torch.relu(torch.nn.functional.conv2d(images, weights["0.weight"], weights["0.bias"], padding=1))
    x = torch.relu(torch.nn.functional.conv2d(x, weights["2.weight"], weights["2.bias"], stride=2)).flatten(1)
    x = torch.nn.functional.layer_norm(x, (144,), weights["5.weight"], weights["5.bias"])
    # The formula of the paper, written out: |W| times the norm of the input channel, lowest half of each row.
    score = weights["6.weight"].abs() * x.norm(dim=0)
    order = score.argsort(dim=1, stable=True)
    wanted = torch.ones_like(score, dtype=torch.bool).scatter_(1, order[:, :72], False)
    assert torch.equal(TorchProgram.open(model).weights["6.weight"] != 0, wanted)


def loss_of(model):
    return float(read_record(model).history[-1].rpartition(" ")[2])


@pytest.mark.parametrize("scope", ["layer", "global", "measured"])
def test_what_stays_makes_up_for_what_went(scope, saved, calibration, tmp_path):
    plain = PruneWeights(sparsity=0.6, scope=scope, data=calibration)
    refitted = PruneWeights(sparsity=0.6, scope=scope, data=calibration, refit=True)
    models = [step.run(saved, Context(tmp_path / str(step.refit))) for step in (plain, refitted)]
    assert zeros(models[1]) == pytest.approx(0.6, abs=0.02)
    assert loss_of(models[1]) < 0.6 * loss_of(models[0])
    if scope == "layer":
        before, after = (TorchProgram.open(model).weights["6.weight"] != 0 for model in models)
        assert bool((before == after).all())


def test_refitting_is_planned_where_there_is_data_and_only_there(request_for, calibration):
    asked = {"compress/prune": {"sparsity": 0.5}}
    assert not PruneWeights.plan(request_for(options=asked)).refit
    assert PruneWeights.plan(request_for(options=asked, calibration=calibration)).refit


def test_wanda_takes_the_share_of_layers_with_few_inputs(tmp_path):
    import numpy as np
    import torch

    from edgeship.core.model import TensorSpec, TorchModel
    from edgeship.data.batches import describe_data
    from edgeship.program.export import make_program

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 40), torch.nn.ReLU(), torch.nn.Linear(40, 2))
    program = make_program(net, [TensorSpec("x", "f32", (1, 3))], [torch.randn(1, 3)], output_names=["y"])
    program.save(tmp_path / "whole")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32))
    step = PruneWeights(sparsity=0.5, method="wanda", data=describe_data(str(tmp_path / "data.npz")))
    whole = TorchModel(tmp_path / "whole", program.signature)
    model = step.run(whole, Context(tmp_path))
    step.ensures(model, model=whole)
    assert read_record(model).pruned["0.weight"] == pytest.approx(0.5)


def test_kept_weights_are_left_whole(saved, tmp_path):
    model = PruneWeights(keep=("10.weight",)).run(saved, Context(tmp_path))
    assert "10.weight" not in read_record(model).pruned


@pytest.mark.parametrize(
    ("step", "error", "says"),
    [
        (PruneWeights(sparsity=1.0), UsageError, "not a share"),
        (PruneWeights(sparsity=0.0), UsageError, "not a share"),
        (PruneWeights(sparsity=0.7, pattern="2:4"), UsageError, "half of every layer"),
        (PruneWeights(method="wanda"), DataError, "needs calibration data"),
        (PruneWeights(keep=("6.wieght",)), UsageError, "no weight 6.wieght"),
        (PruneWeights(sparsity=0.97, scope="global"), UsageError, "0.97 is too much"),
        (PruneWeights(sparsity=0.97, scope="measured"), UsageError, "0.97 is too much"),
        (PruneWeights(samples=0), UsageError, "must be at least 1"),
        (PruneWeights(measured=0), UsageError, "must be at least 1"),
        (PruneWeights(refit=True), DataError, "refit needs calibration data"),
    ],
)
def test_bad_options_are_refused_while_planning(step, error, says, request_for):
    with pytest.raises(error, match=says):
        step.confirm(request_for())
