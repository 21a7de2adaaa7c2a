"""Records go to JSON and TOML and come back equal; what does not fit is an error that names file and key."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.core.model import CoreMLModel, Placement, Signature, TensorSpec
from edgeship.core.records import from_plain, read_json, read_toml, suggest, to_plain, write_json
from edgeship.core.target import Target
from edgeship.core.weights import Affine, Float
from edgeship.errors import ArtifactError, UsageError

words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
sizes = st.lists(st.integers(0, 2**40), max_size=4).map(tuple)
numbers = st.floats(allow_nan=False, allow_infinity=False)
specs = st.builds(
    TensorSpec, words, st.sampled_from(["f32", "i64", "bool"]), sizes, st.none() | words, st.none() | numbers,
    st.none() | numbers, st.none() | st.lists(numbers, max_size=3).map(tuple), st.none(),
)  # fmt: skip
placements = st.builds(Placement, words, words, st.none() | sizes, st.none() | sizes)
artifacts = st.builds(
    CoreMLModel, st.just(Path("model.mlpackage")),
    st.builds(Signature, st.lists(specs, max_size=2).map(tuple), st.just(())),
    words, st.lists(words, max_size=2).map(tuple), st.lists(placements, max_size=2).map(tuple),
    st.sampled_from(["f32", "f16", "int"]), st.dictionaries(words, words, max_size=2),
)  # fmt: skip


@dataclass(frozen=True)
class Shelf:
    """Every kind of field that a record may have."""

    count: int
    share: float
    open: bool
    side: Literal["left", "right"]
    pair: tuple[int, float]
    names: tuple[str, ...] = ()
    encoding: Float | Affine | None = None
    inner: dict[str, TensorSpec] = field(default_factory=dict)


shelves = st.builds(
    Shelf, st.integers(), numbers, st.booleans(), st.sampled_from(["left", "right"]), st.tuples(st.integers(), numbers),
    st.lists(words).map(tuple),
    st.sampled_from([None, Float(32), Affine(4), Affine(8, False, "tensor"), Affine(4, True, "group", 32)]),
    st.dictionaries(words, specs, max_size=2),
)  # fmt: skip

GOOD = {"count": 1, "share": 2, "open": True, "side": "left", "pair": [1, 2.5]}


@given(artifacts | shelves)
def test_what_is_written_reads_back_equal(tmp_path_factory, record):
    path = tmp_path_factory.getbasetemp() / "record.json"
    write_json(path, record)
    assert read_json(type(record), path) == record


def test_a_union_comes_back_as_the_class_it_was():
    for encoding in (Float(16), Affine(8)):
        plain = to_plain(Shelf(1, 2.0, True, "left", (1, 2.0), encoding=encoding))
        assert type(from_plain(Shelf, plain).encoding) is type(encoding)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"count": "one"}, "Shelf.count: expected int, found 'one'"),
        ({"count": True}, "Shelf.count: expected int"),
        ({"count": 1.5}, "Shelf.count: expected int"),
        ({"share": "much"}, "Shelf.share: expected float"),
        ({"share": True}, "Shelf.share: expected float"),
        ({"open": 1}, "Shelf.open: expected bool"),
        ({"side": "middle"}, "Shelf.side: 'middle' is not one of left, right"),
        ({"side": []}, "Shelf.side: [] is not one of"),
        ({"pair": [1]}, "Shelf.pair: expected 2 items"),
        ({"pair": [1, 2, 3]}, "Shelf.pair: expected 2 items"),
        ({"pair": 3}, "Shelf.pair: expected a list"),
        ({"names": [1]}, "Shelf.names[0]: expected str"),
        ({"names": "abc"}, "Shelf.names: expected a list"),
        ({"inner": []}, "Shelf.inner: expected a table"),
        ({"inner": {"x": 3}}, "Shelf.inner.x: expected a table"),
        ({"encoding": {"kind": "affine", "bits": 7}}, "Shelf.encoding"),
        ({"encoding": 3}, "Shelf.encoding"),
        ({"cuont": 1}, "unknown key 'cuont'; did you mean count?"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(change, says):
    with pytest.raises(UsageError) as raised:
        from_plain(Shelf, {**GOOD, **change})
    assert says in str(raised.value)


def test_a_missing_key_is_named():
    with pytest.raises(UsageError, match="key 'side' is missing"):
        from_plain(Shelf, {key: value for key, value in GOOD.items() if key != "side"})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | words,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*GOOD, "kind", "inner", "encoding"]), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_no_data_gets_past_the_readers_own_errors(data):
    try:
        from_plain(Shelf, data)
    except UsageError as error:
        assert str(error).startswith("Shelf")


@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff\xfe", b'{"count": 1}', b"", b"null"])
def test_a_damaged_json_file_is_named(tmp_path, content):
    path = tmp_path / "shelf.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"shelf\.json"):
        read_json(Shelf, path)


def test_a_missing_json_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"gone\.json is missing; build again"):
        read_json(Shelf, tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name = ", "phone.toml"),
        ('name = "x"\ntilte = "y"', "unknown key 'tilte'; did you mean title?"),
        ('name = "x"', "phone.toml: key 'title' is missing"),
        ('name = "x"\ntitle = "X"\nchip = 3', "phone.toml.chip: expected a table"),
    ],
)
def test_a_toml_file_is_named_with_its_key(tmp_path, text, says):
    path = tmp_path / "phone.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as raised:
        read_toml(Target, path)
    assert says in str(raised.value)


def test_an_unknown_name_gets_the_nearest_or_the_list():
    assert suggest("iphone15", ["iphone15pro", "pixel8"]) == "did you mean iphone15pro?"
    assert suggest("zzzz", ["b", "a"]) == "known: a, b"
