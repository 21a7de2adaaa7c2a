import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeship.compression.allocate import Option, allocate, trade_off
from edgeship.core.weights import Affine
from edgeship.errors import GateError

options = st.lists(
    st.builds(Option, st.just(Affine()), st.integers(1, 50), st.floats(0, 10, allow_nan=False)), min_size=1, max_size=3
)
models = st.dictionaries(st.sampled_from("abcde"), options, min_size=1, max_size=4)


def best_by_trying_all(layers, max_bytes):
    tries = itertools.product(*layers.values())
    fitting = [sum(o.loss for o in choice) for choice in tries if sum(o.bytes for o in choice) <= max_bytes]
    return min(fitting, default=None)


@settings(max_examples=60, deadline=None)
@given(models, st.integers(1, 150))
def test_loses_no_more_than_the_best_of_all_choices(layers, max_bytes):
    best = best_by_trying_all(layers, max_bytes)
    if best is None:
        with pytest.raises(GateError, match="the smallest takes"):
            allocate(layers, max_bytes)
        return
    found = allocate(layers, max_bytes)
    assert found.bytes <= max_bytes
    assert found.chosen.keys() == layers.keys()
    assert found.loss == pytest.approx(best, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(models)
def test_the_curve_is_monotone(layers):
    curve = trade_off(layers, 6)
    for smaller, larger in itertools.pairwise(curve):
        assert larger.loss <= smaller.loss + 1e-9
