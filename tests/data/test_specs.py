"""Input specifications as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.core.model import NUMPY_DTYPES, TensorSpec
from edgeship.data.specs import example_tensors, parse_input, parse_inputs, with_notes
from edgeship.errors import UsageError


@given(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,10}", fullmatch=True),
    st.sampled_from(sorted(NUMPY_DTYPES)),
    st.lists(st.integers(1, 9999), max_size=5),
)
def test_what_is_printed_reads_back(name, dtype, sizes):
    spec = TensorSpec(name, dtype, tuple(sizes))
    assert parse_input(str(spec)) == spec
    assert parse_input(f" {name} : {dtype}[ {' , '.join(map(str, sizes))} ]") == spec


@pytest.mark.parametrize(
    "text",
    ["", "x", "x:f32", "x:f32[]x", ":f32[1]", "x:f32[a]", "x:f32[-1]", "x:f32[1.5]", "x:f32[0]", "x[1]"],
)
def test_what_does_not_read_says_how_to_write_it(text):
    with pytest.raises(UsageError, match=r"write name:f32\[1,3,224,224\]"):
        parse_input(text)


def test_an_unknown_dtype_lists_the_known():
    with pytest.raises(UsageError, match="no dtype float32; use f32, f16, i64"):
        parse_input("x:float32[1]")


@given(st.text(max_size=30))
def test_no_text_gets_past_the_readers_own_error(text):
    try:
        parse_input(text)
    except UsageError as error:
        assert "\n" not in str(error)


def test_a_name_twice_is_refused():
    with pytest.raises(UsageError, match="two inputs are called x"):
        parse_inputs(["x:f32[1]", "y:f32[1]", "x:f32[2]"])


def test_notes_go_to_their_input():
    specs = parse_inputs(["a:f32[1]", "b:f32[2]"])
    noted = with_notes(specs, {"b": {"layout": "N", "mean": [0.5], "std": (0.5,), "low": -1.0}})
    assert noted[0] == specs[0]
    assert (noted[1].layout, noted[1].mean, noted[1].std, noted[1].low) == ("N", (0.5,), (0.5,), -1.0)
    with pytest.raises(UsageError, match="notes for an input c, which the model has not; it has a, b"):
        with_notes(specs, {"c": {}})


def test_examples_fit_their_specs():
    specs = parse_inputs(["a:f32[2,3]", "b:i64[4]", "c:bool[1]"])
    assert [(tuple(t.shape), str(t.dtype)) for t in example_tensors(specs)] == [
        ((2, 3), "torch.float32"), ((4,), "torch.int64"), ((1,), "torch.bool"),
    ]  # fmt: skip
