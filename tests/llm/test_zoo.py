"""Families that the goal names, through the engines that say whether a graph is right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import decoder_zoo

# A table of who sees whom in the layers themselves, which counts from the end of what is cached.
REFUSED = {("gpt_neo", "litert-lm"): "layers 0, 1, 2, 3 attend in code of their own"}


@pytest.mark.heavy
@pytest.mark.parametrize("engine", decoder_zoo.ENGINES)
@pytest.mark.parametrize("name", decoder_zoo.NAMED)
def test_greedy_tokens_are_those_of_transformers_or_it_is_refused(name, engine) -> None:
    (found,) = decoder_zoo.measure(name, [engine]).values()
    refused = REFUSED.get((name, engine))
    assert found["state"] == ("refused" if refused else "passed"), found
    if refused:
        assert refused in found["line"]
