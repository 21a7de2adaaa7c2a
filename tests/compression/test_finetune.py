import dataclasses
from collections import ChainMap

import numpy as np
import pytest
import torch
from torch import nn

from edgeship.compression.affine import quantize_nearest
from edgeship.compression.calibrate import decide_activations
from edgeship.compression.finetune import finetune
from edgeship.compression.prune import keep_mask, magnitude_score
from edgeship.core.model import TensorSpec
from edgeship.core.weights import Affine
from edgeship.errors import DataError, UsageError
from edgeship.program.compare import Comparison, Reference
from edgeship.program.export import make_program

LOW = Affine(3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(1, 6, 3), nn.Linear(96, 32), nn.Linear(32, 5)

    def forward(self, x):
        return self.second(torch.relu(self.first(torch.relu(self.conv(x)).flatten(1))))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return make_program(
        Net(), [TensorSpec("x", "f32", (1, 1, 6, 6))], [torch.randn(1, 1, 6, 6)], output_names=["logits"]
    )


@pytest.fixture(scope="module")
def batches():
    rows = np.random.default_rng(0).standard_normal((240, 1, 1, 6, 6)).astype(np.float32)
    return [{"x": row} for row in rows]


def encodings(program, encoding=LOW):
    return {use.name: encoding for use in program.record.inventory.weights if use.op in ("linear", "conv")}


def with_weights(program, weights):
    return dataclasses.replace(program, weights=ChainMap(weights, program.weights))


def stored(program, encoding=LOW, clip=False):
    """The program with its weights rounded."""
    made = {name: quantize_nearest(program.weights[name], encoding, clip=clip) for name in encodings(program)}
    record = dataclasses.replace(program.record, encodings=dict.fromkeys(made, encoding))
    return dataclasses.replace(program, encoded=made, record=record)


def decibels(program, other, batches):
    result, wanted, found = Comparison(), Reference(program), Reference(other)
    for batch in batches:
        result.add(wanted.run(batch), found.run(batch))
    return result.snr_db


def test_distilled_weights_answer_closer_once_rounded(program, batches):
    seen = []
    trained = finetune(
        program, encodings(program), batches[:200], steps=60, lr=1e-4, progress=lambda *args: seen.append(args)
    )
    assert trained.keys() == dict(program.filled().module().named_parameters()).keys()
    before = decibels(program, stored(program), batches[200:])
    after = decibels(program, stored(with_weights(program, trained)), batches[200:])
    assert after > before + 1
    assert [item[0] for item in seen] == list(range(1, 61))
    assert seen[-1][2].startswith("loss ")


def test_the_same_seed_gives_the_same_bits_and_the_callers_own_draws_stay(program, batches):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    runs = [finetune(program, encodings(program), batches, steps=3, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("encoding", [LOW, Affine(4, False), Affine(3, True, "tensor")])
def test_the_step_computes_with_what_rounding_will_store(program, batches, encoding, clip):
    answers = []

    def loss(module, batch):
        (answer,) = module(batch["x"])
        answers.append(answer.detach().numpy())
        return answer.square().sum()

    finetune(program, encodings(program, encoding), batches[:1], steps=1, samples=1, loss=loss, clip=clip)
    wanted = Reference(stored(program, encoding, clip)).run(batches[0])
    np.testing.assert_allclose(answers[0], wanted["logits"], rtol=1e-4, atol=1e-5)


def test_a_users_step_sees_labels_and_its_loss_falls(program, batches):
    labelled = [{**batch, "label": np.array([index % 5])} for index, batch in enumerate(batches[:20])]
    losses = []

    def loss(module, batch):
        value = nn.functional.cross_entropy(module(batch["x"])[0], batch["label"])
        losses.append(float(value))
        return value

    finetune(program, encodings(program), labelled, steps=40, samples=5, lr=3e-3, loss=loss)
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:20])


def test_pruned_weights_stay_zero(program, batches):
    masks = {name: keep_mask(magnitude_score(program.weights[name]), 0.5) for name in encodings(program)}
    trained = finetune(program, encodings(program), batches, steps=5, lr=1e-2, masks=masks)
    for name, mask in masks.items():
        assert not trained[name][~mask].any()
        assert not torch.equal(trained[name], program.weights[name] * mask)


def test_static_activations_take_part(program, batches):
    activations = decide_activations(program, batches[:20], bits=8)
    static = dataclasses.replace(program, record=dataclasses.replace(program.record, activations=activations))
    answers = []

    def loss(module, batch):
        (answer,) = module(batch["x"])
        answers.append(answer.detach().numpy())
        return answer.square().sum()

    trained = finetune(static, {}, batches[:1], steps=1, samples=1, loss=loss)
    np.testing.assert_allclose(answers[0], Reference(static).run(batches[0])["logits"], atol=0.02)
    assert not np.array_equal(answers[0], Reference(program).run(batches[0])["logits"])
    assert not torch.equal(trained["first.weight"], program.weights["first.weight"])


def test_unfit_orders_are_refused(program, batches):
    with pytest.raises(DataError, match="at least one sample"):
        finetune(program, {}, [])
    with pytest.raises(UsageError, match="nowhere is not a weight"):
        finetune(program, {"nowhere": LOW}, batches)
    with pytest.raises(UsageError, match="above zero"):
        finetune(program, {}, batches, steps=0)
    with pytest.raises(DataError, match="training loss is nan"):
        finetune(program, {}, [{"x": np.full((1, 1, 6, 6), np.nan, np.float32)}], steps=1)
