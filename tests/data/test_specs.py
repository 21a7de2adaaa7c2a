"""Input specifications as people write them."""

import json
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.core.model import NUMPY_DTYPES, TensorSpec
from edgeship.data.specs import (
    Fixed,
    example_tensors,
    in_command,
    parse_input,
    parse_inputs,
    parse_renames,
    split_inputs,
    with_notes,
)
from edgeship.errors import UsageError


@given(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,10}", fullmatch=True),
    st.sampled_from(sorted(NUMPY_DTYPES)),
    st.lists(st.integers(1, 60), max_size=4),
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
    with pytest.raises(UsageError, match="the model has no input c; it has a, b"):
        with_notes(specs, {"c": {}})


def test_examples_fit_their_specs():
    specs = parse_inputs(["a:f32[2,3]", "b:i64[4]", "c:bool[1]"])
    assert [(tuple(t.shape), str(t.dtype)) for t in example_tensors(specs)] == [
        ((2, 3), "torch.float32"), ((4,), "torch.int64"), ((1,), "torch.bool"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("serving_default_x:0:f32[1,32]", "serving_default_x:0"),
        ('"serving_default_x:0":f32[1,32]', "serving_default_x:0"),
        ("'a b':f32[2]", "a b"),
        ("onnx::Flatten_0:f32[1]", "onnx::Flatten_0"),
        ("0:i64[]", "0"),
        ("größe:f32[1]", "größe"),
    ],
)
def test_any_name_can_be_typed(text, name):
    assert parse_input(text).name == name


@given(st.text(min_size=1, max_size=20).filter(lambda name: name.strip() == name and name.strip("\"' :") != ""))
def test_what_is_printed_for_any_name_reads_back(name):
    if name[0] in "\"'" or "\0" in name:
        return
    (word,) = shlex.split(in_command(name, ":f32[1,2]").removeprefix("--input "))
    assert parse_input(word).name == name
    (word,) = shlex.split(in_command(name, "=16000").removeprefix("--input "))
    if '"' not in name and "\n" not in name:
        assert split_inputs([word])[1] == [Fixed(name, 16000)]


@pytest.mark.parametrize("value", [16000, 0.5, True, [1, 2], [[1.5], [2]]])
def test_a_value_fixes_an_input(value):
    specs, fixed = split_inputs(["x:f32[1]", f"sr={json.dumps(value)}"])
    assert [spec.name for spec in specs] == ["x"]
    assert fixed == [Fixed("sr", value)]


@pytest.mark.parametrize(
    "text", ["sr=", "sr=abc", 'sr={"a":1}', "sr=NaN", "sr=null", "sr=" + "[" * 3000, '="x"', "sr=[[[1]],null]"]
)
def test_what_is_no_value_is_refused(text):
    with pytest.raises(UsageError):
        split_inputs([text])


def test_only_files_with_a_graph_have_inputs_to_fix():
    with pytest.raises(UsageError, match="which is for inputs of ONNX files"):
        parse_inputs(["sr=16000"])


def test_inputs_get_other_names():
    assert parse_renames(["x:0=image", '"a=b"=mask']) == {"x:0": "image", "a=b": "mask"}
    for wrong in (["x:0"], ["x=größe"], ["x=state"], ["x=a", "y=a"], ["x=a", "x=b"]):
        with pytest.raises(UsageError, match="--input-name"):
            parse_renames(wrong)
    (spec,) = with_notes(parse_inputs(["x:0:f32[1]"]), {"x_0": {"name": "image", "low": 0.0}})
    assert (spec.name, spec.source, spec.low) == ("image", "x:0", 0.0)
    assert spec.of({"x:0": 1}) == spec.of({"image": 1}) == 1
    assert spec.of({"y": 1}) is None
    two = parse_inputs(["u:f32[1]", "v:f32[1]"])
    assert [item.name for item in with_notes(two, {"u": {"name": "v"}, "v": {"name": "u"}})] == ["v", "u"]
    with pytest.raises(UsageError, match="u cannot be called v: another input has that name"):
        with_notes(two, {"u": {"name": "v"}})
