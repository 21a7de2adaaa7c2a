import math

import numpy as np
import pytest
import torch

from edgeship.data.metrics import METRICS, Score, find_metric
from edgeship.errors import DataError, UsageError


def run(name, pairs, inputs=None, labels=None):
    metric = find_metric(name)
    for i, (found, original) in enumerate(pairs):
        given = {"x": np.zeros(1)} if inputs is None else {"x": inputs[i]}
        metric.add(given, {"y": found}, {"y": original}, None if labels is None else labels[i])
    return metric


def test_accuracy_counts_and_its_drop_is_in_points():
    right, wrong = np.array([[0.1, 0.9]]), np.array([[0.9, 0.1]])
    score = run("accuracy", [(right, right), (wrong, right)], labels=[1, 1]).checked()
    assert (score.after, score.before, score.drop) == (0.5, 1.0, 0.5)


def test_perplexity_is_that_of_torch():
    generator = np.random.default_rng(0)
    scores = [generator.normal(size=(1, 9, 5)) for _ in range(3)]
    ids = [generator.integers(0, 5, (1, 9)) for _ in range(3)]
    found = run("perplexity", [(s, s * 0.5) for s in scores], inputs=ids).checked()
    for factor, value in ((1.0, found.after), (0.5, found.before)):
        losses = [
            torch.nn.functional.cross_entropy(torch.tensor(s[0, :-1] * factor), torch.tensor(i[0, 1:]), reduction="sum")
            for s, i in zip(scores, ids, strict=True)
        ]
        assert value == pytest.approx(math.exp(float(sum(losses)) / 24))
    assert found.drop == pytest.approx(found.after / found.before - 1)


def test_cosine_and_noise():
    a, b = np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]])
    assert run("cosine", [(a, b), (b, b)]).checked().after == pytest.approx((math.sqrt(0.5) + 1) / 2)
    assert run("snr", [(a * 1.1, a)]).checked().after == pytest.approx(20, abs=1e-6)
    assert run("snr", [(a, a)]).checked().after == pytest.approx(200)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("accuracy", "accuracy 99.00% against 98.00% of the original"),
        ("perplexity", "perplexity 0.99 against 0.98 of the original"),
        ("cosine", "cosine 0.9900 to the original"),
        ("snr", "SNR 1.0 dB to the original"),
    ],
)
def test_figures_in_words_have_their_unit(name, words):
    assert find_metric(name).describe(Score(0.99, 0.98, 0.0)) == words


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_figure_that_is_no_number_is_an_error(name):
    nan = np.full((1, 4, 3), np.nan)
    with pytest.raises(DataError, match=r"not a number|not finite"):
        run(name, [(nan, nan)], inputs=[np.zeros((1, 4), np.int64)], labels=[0]).checked()


def test_a_function_of_the_users(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def score(outputs, labels):\n    return sum(float(o['y'].sum()) for o in outputs)\n")
    score = run(f"{file}:score", [(np.array([3.0]), np.array([4.0]))]).checked()
    assert (score.after, score.before, score.drop) == (3.0, 4.0, 0.25)
    file.write_text("def score(outputs, labels):\n    return float('nan')\n")
    with pytest.raises(DataError, match="not a number"):
        run(f"{file}:score", [(np.array([3.0]), np.array([4.0]))]).checked()
    file.write_text("def score(outputs):\n    return 1\n")
    with pytest.raises(DataError, match="failed"):
        run(f"{file}:score", [(np.array([3.0]), np.array([4.0]))]).checked()


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UsageError, match="perplexity"):
        find_metric("perplexty")
