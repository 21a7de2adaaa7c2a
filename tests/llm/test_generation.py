from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.errors import UsageError
from edgeship.llm.generation import Stepper, find_loop, generate


class Counting(Stepper):
    """Answers with the token after the last one; notes how it was fed."""

    chunk, context = 4, 32

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.position, self.fed = 0, []

    def prefill(self, tokens) -> None:
        assert len(tokens) == self.chunk
        self.fed.append(list(tokens))
        self.position += len(tokens)

    def decode(self, token):
        self.fed.append(token)
        self.position += 1
        return np.eye(64, dtype=np.float32)[token + 1]


def test_a_prompt_is_taken_in_chunks_and_its_last_token_is_decoded() -> None:
    model = Counting()
    model.read(range(1, 11))
    assert model.fed == [[1, 2, 3, 4], [5, 6, 7, 8], 9, 10]
    model.reset()
    model.read(range(1, 5))
    assert model.fed == [1, 2, 3, 4], "the last token is for decode, so there is no whole chunk"


def test_generation_ends_at_eos_at_the_limit_and_at_the_context() -> None:
    assert list(generate(Counting(), [5], 10, eos=[8])) == [6, 7, 8]
    assert list(generate(Counting(), [5], 3)) == [6, 7, 8]
    assert len(list(generate(Counting(), [1] * 30, 20))) == 3


def test_texts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="33 tokens do not fit the context of 32"):
        Counting().read([1] * 33)
    with pytest.raises(UsageError, match="empty"):
        Counting().read([])


@given(st.lists(st.integers(0, 9), max_size=30), st.lists(st.integers(10, 19), min_size=1, max_size=5))
def test_a_repeated_tail_is_a_loop(head, cycle) -> None:
    found = find_loop([*head, *cycle * 16])
    assert found is not None
    assert len(cycle) % len(found.cycle) == 0
    assert find_loop([*head, *cycle * 16, 99, 98]) is None


def test_ordinary_text_is_no_loop() -> None:
    assert find_loop(list(range(100))) is None
    assert find_loop([1, 2, 3] * 3) is None
    assert find_loop([]) is None
