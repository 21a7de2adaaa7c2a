"""Options of passes: text of ``--set`` and typed values end in the same mapping, or in the same error."""

import dataclasses
import typing

import pytest

from edgeship.core.registry import passes
from edgeship.core.settings import Settings, collect, parse_settings, settings_of, typed_value
from edgeship.errors import UsageError
from edgeship.passes.compress.quantize import QuantizeWeights

Quantize = settings_of(QuantizeWeights)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("compress/quantize.bits=4", 4),
        ("compress/quantize.symmetric=false", False),
        ("compress/quantize.symmetric=True", True),
        ("compress/quantize.group_size=none", None),
        ("compress/quantize.group_size=64", 64),
        ("compress/quantize.method=gptq", "gptq"),
        ("compress/quantize.minutes=1.5", 1.5),
        ("check/verify.min_snr_db=10", 10),
        ("check/verify.min_snr_db=1e1", 10.0),
        ("lower/torch_to_coreml.target=iOS17", "iOS17"),
        ("compress/finetune.loss=a.py:f=g", "a.py:f=g"),
    ],
)
def test_text_is_read_in_the_type_of_the_field(text, value):
    name, _, rest = text.partition(".")
    field = rest.partition("=")[0]
    options = parse_settings([text])
    assert options == {name: {field: value}}
    assert type(options[name][field]) is type(value)
    # What is typed already stays as it is, and both sides agree.
    assert collect([Settings(name, {field: value})], {}) == options
    assert collect([], {name: {field: value}}) == options


def test_a_later_word_replaces_an_earlier_one_of_the_command_line():
    assert parse_settings(["compress/quantize.bits=8", "compress/quantize.bits=4"]) == {
        "compress/quantize": {"bits": 4}
    }


def test_only_what_was_given_is_set():
    assert Quantize() == Settings("compress/quantize", {})
    assert Quantize(bits=8) == Settings("compress/quantize", {"bits": 8})
    assert Quantize("palette", 4) == Settings("compress/quantize", {"form": "palette", "bits": 4})
    assert "bits" in Quantize.__doc__
    assert Quantize.__name__ == "QuantizeWeights"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("bit", 4, "compress/quantize has no option bit; did you mean bits?"),
        ("bits", 4.5, "compress/quantize.bits: expected int, found 4.5"),
        ("bits", True, "compress/quantize.bits: expected int, found True"),
        ("bits", None, "compress/quantize.bits: expected int, found None"),
        ("bits", "four", "compress/quantize.bits: expected int, found 'four'"),
        ("bits", 2**60, "is not a usable number"),
        ("method", "gpt", "compress/quantize.method: 'gpt' is not one of nearest, clipped, gptq, awq"),
        ("data", "d.npz", "compress/quantize.data is set by the command line; change --calibration or --eval instead"),
        ("minutes", float("nan"), "is not a usable number"),
    ],
)
def test_what_does_not_fit_is_refused_the_same_way_everywhere(field, value, says):
    refused = []
    for attempt in (
        lambda: Quantize(**{field: value}),
        lambda: collect([], {"compress/quantize": {field: value}}),
        lambda: parse_settings([f"compress/quantize.{field}={value}"]),
    ):
        with pytest.raises(UsageError) as raised:
            attempt()
        refused.append(str(raised.value))
    assert says in refused[0]
    assert refused[0] == refused[1]
    assert refused[2].split(":")[0].split(";")[0].split(" of ")[0] in refused[0].replace("found ", "")


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda: parse_settings(["bits=8"]), "--set 'bits=8' is not pass.field=value"),
        (lambda: parse_settings(["compress/quantise.bits=8"]), 'no pass "compress/quantise"; did you mean'),
        (lambda: collect([], {"compress/quantise": {}}), 'no pass "compress/quantise"; did you mean'),
        (lambda: collect([Quantize(bits=4)], {"compress/quantize": {"bits": 4}}), "compress/quantize.bits is given twice"),
        (lambda: collect([QuantizeWeights(bits=4)], {}), "is not a setting of a pass; write passes="),
        (lambda: collect([], {"compress/quantize": 4}), "options of compress/quantize are 4, not a table"),
    ],
)  # fmt: skip
def test_other_forms_are_refused(attempt, says):
    with pytest.raises(UsageError) as raised:
        attempt()
    assert says in str(raised.value)


def test_the_default_of_every_option_is_a_value_of_its_type():
    """What ``passes=[...]`` takes is what the pass itself has: no default is refused."""
    for cls in passes().values():
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            if item.name in cls.options() and item.default is not dataclasses.MISSING:
                assert typed_value(cls, item.name, item.default) == item.default, (
                    cls.name,
                    item.name,
                    hints[item.name],
                )
