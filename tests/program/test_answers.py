"""What one step asked a program is not worked out again by the next, and is never taken for anything else's."""

import subprocess
import sys

import numpy as np
import pytest

from edgeship.program.answers import Answers
from edgeship.program.compare import Reference
from edgeship.program.conditioning import UNIT, Trembling


def counted(value=1.0):
    calls = []

    def make():
        calls.append(value)
        return {"y": np.array([value])}, "text"

    return make, calls


def ask(answers, x, make, *how):
    return float(answers.of({"x": np.array(x)}, make, *how)[0]["y"][0])


def test_the_same_question_is_asked_once(tmp_path):
    make, calls = counted()
    assert ask(Answers(tmp_path, "program"), [1.0], make) == 1
    found, text = Answers(tmp_path, "program").of({"x": np.array([1.0])}, make)
    assert calls == [1.0]
    assert (found["y"].tolist(), text) == ([1.0], "text")


@pytest.mark.parametrize(
    "other",
    [
        lambda folder, make: ask(Answers(folder, "other"), [1.0], make),
        lambda folder, make: ask(Answers(folder, "program", "quantized"), [1.0], make),
        lambda folder, make: ask(Answers(folder, "program"), [1.0], make, "moved", 0.5),
        lambda folder, make: ask(Answers(folder, "program"), [1.5], make),
        lambda folder, make: ask(Answers(folder, "program"), [[1.0]], make),
        lambda folder, make: ask(Answers(folder, "program"), np.float32([1.0, 0]), make),
        lambda folder, make: float(Answers(folder, "program").of({"z": np.array([1.0])}, make)[0]["y"][0]),
    ],
)
def test_another_question_has_its_own_answer(tmp_path, other):
    first, _ = counted(1.0)
    second, calls = counted(2.0)
    ask(Answers(tmp_path, "program"), [1.0], first)
    assert other(tmp_path, second) == 2
    assert calls == [2.0]


@pytest.mark.parametrize("answers", [Answers(None, "program"), Answers(None), Answers(None, "")])
def test_without_a_folder_or_a_digest_nothing_is_kept(answers):
    make, calls = counted()
    ask(answers, [1.0], make)
    ask(answers, [1.0], make)
    assert len(calls) == 2


def test_an_answer_that_is_too_large_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("edgeship.program.answers.MAX_BYTES", 7)
    make, calls = counted()
    ask(Answers(tmp_path, "program"), [1.0], make)
    ask(Answers(tmp_path, "program"), [1.0], make)
    assert len(calls) == 2


def test_a_damaged_file_is_worked_out_again(tmp_path):
    make, calls = counted()
    ask(Answers(tmp_path, "program"), [1.0], make)
    for file in tmp_path.glob("*.npz"):
        file.write_bytes(file.read_bytes()[:50])
    assert ask(Answers(tmp_path, "program"), [1.0], make) == 1
    assert len(calls) == 2


SCRIPT = """
import sys, time
from pathlib import Path
import numpy as np
from edgeship.program.answers import Answers

def make():
    with open(sys.argv[1] + "/made", "a") as file:
        file.write("x")
    time.sleep(1)
    return {"y": np.array([1.0])}, ""

Answers(Path(sys.argv[1]), "program").of({"x": np.array([1.0])}, make)
"""


def test_two_processes_that_ask_at_once_work_it_out_once(tmp_path):
    both = [subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert (tmp_path / "made").read_text() == "x"


def test_references_answer_as_they_do_without_it(layers_program, tmp_path):
    """Bit for bit, from the file too; no graph is built for what is there already."""
    generator = np.random.default_rng(0)
    batch = {
        "x": generator.standard_normal((1, 3, 16, 16)).astype(np.float32),
        "ids": np.array([[1, 2, 3, 4, 5]]),
    }
    plain = Reference(layers_program).run(batch)
    moved, peak = Trembling(layers_program).run(batch, UNIT["f16"], weights="share")
    for _ in range(2):
        reference = Reference(layers_program, kept=Answers(tmp_path, "digest"))
        trembling = Trembling(layers_program, Answers(tmp_path, "digest"))
        for wanted, found in ((plain, reference.run(batch)), (moved, trembling.run(batch, UNIT["f16"], weights="share")[0])):  # fmt: skip
            assert wanted.keys() == found.keys()
            assert all(np.array_equal(wanted[name], found[name]) for name in wanted)
        assert trembling.run(batch, UNIT["f16"], weights="share")[1] == peak
    assert "_module" not in vars(reference)
    assert "_module" not in vars(trembling)


def test_weights_go_once_all_that_will_be_asked_is_answered(layers_program, tmp_path):
    generator = np.random.default_rng(0)
    batches = [
        {"x": generator.standard_normal((1, 3, 16, 16)).astype(np.float32), "ids": np.array([[1, 2, 3, 4, number]])}
        for number in range(3)
    ]
    reference = Reference(layers_program, kept=Answers(tmp_path, "digest"))
    reference.leave(batches[:2])
    plain = Reference(layers_program)
    for batch in batches[:2]:
        for name, wanted in plain.run(batch).items():
            assert np.array_equal(reference.run(batch)[name], wanted)
        # No experts: which of them is chosen is not asked of the weights either.
        assert not reference.undecided({"x": batch["ids"], "ids": batch["ids"]}, 1.0).any()
    assert "_module" not in vars(reference)
    # What was not announced is answered all the same.
    assert all(
        np.array_equal(reference.run(batches[2])[name], wanted) for name, wanted in plain.run(batches[2]).items()
    )
    unkept = Reference(layers_program)
    unkept.leave(batches)
    assert "_module" not in vars(unkept), "nothing is answered twice"


def test_the_largest_value_is_the_largest_finite_one():
    import torch

    from edgeship.program.conditioning import _largest

    for values in ([1.0, -3.0], [float("inf"), 2.0, -1.0], [float("nan"), -5.0], [float("-inf")], [], [0.0, -0.0]):
        finite = [abs(value) for value in values if np.isfinite(value)]
        assert _largest(torch.tensor(values)) == max(finite, default=0.0)
