"""Names of inputs and outputs: any text becomes a name that every runtime takes, once, and clean ones stay."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.core.names import clean_name, clean_names, in_shell, is_clean, quoted

TEXTS = st.one_of(
    st.text(max_size=80), st.sampled_from(["x:0", "x_0", "x 0", "x.0", "state", "return", "0", "", "größe"])
)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("serving_default_x:0", "serving_default_x_0"),
        ("input.1", "input_1"),
        ("onnx::Flatten_0", "onnx_Flatten_0"),
        ("state", "input_state"),
        ("return", "input_return"),
        ("0", "input_0"),
        ("größe", "grosse"),
        ("a b", "a_b"),
        ("输入", "input"),
        ("x", "x"),
        ("self", "self"),
    ],
)
def test_the_nearest_name(name: str, clean: str) -> None:
    assert clean_name(name, "input") == clean


@given(st.lists(TEXTS, max_size=12), st.sets(st.sampled_from(["x_0", "x", "input", "state"])))
def test_every_name_is_clean_and_none_is_met_twice(names: list[str], avoided: set[str]) -> None:
    found = clean_names(names, "input", avoided=avoided)
    assert all(is_clean(name) or len(name) > 60 for name in found)
    assert len(set(found)) == len(found)
    for name, clean in zip(names, found, strict=True):
        if is_clean(name) and names.count(name) == 1:
            assert clean == name
        elif clean != name:
            assert clean not in avoided
    ends = clean_names(names, "output", taken=found)
    assert not set(ends) & set(found)


@given(st.text(min_size=1, max_size=30))
def test_what_is_shown_for_a_shell_is_one_word_of_it(text: str) -> None:
    if "\0" not in text:
        assert shlex.split(in_shell(text)) == [text]


def test_a_plain_name_needs_no_quotes() -> None:
    assert quoted("encoder/x.1") == "encoder/x.1"
    assert quoted("x:0") == '"x:0"'
