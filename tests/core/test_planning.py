"""What passes ask while they are planned: the encoding that will be, and whether the target holds it."""

import dataclasses
import re
from pathlib import Path

import pytest

from edgeship.core.choice import Choice
from edgeship.core.encodings import encoding_named
from edgeship.core.inventory import Inventory, WeightUse
from edgeship.core.model import Source
from edgeship.core.planning import (
    held_candidates,
    kept_weights,
    next_wider,
    planned_encoding,
    refusal,
    refuse_unholdable,
)
from edgeship.core.profile import Profile, Request
from edgeship.core.registry import targets
from edgeship.core.weights import Affine, Float, Palette
from edgeship.errors import EncodingError, UsageError

OLDER = {"lower/torch_to_coreml": {"target": "iOS17"}}


def request(weights="int8", runtime="onnx", **options):
    source = Source(Path("model.py"), (), reference="model.py:f")
    inventory = Inventory((WeightUse("w", "linear", (64, 64)),), (), 0)
    choice = Choice(weights, candidates=("int8", "int4-g32")) if weights == "auto" else Choice(weights)
    profile = Profile("mine", "of a test", choice)
    return Request(source, targets()["iphone15pro"], runtime, profile, inventory, options=options)


@pytest.mark.parametrize(
    ("weights", "given", "wanted"),
    [
        ("int8", {}, "int8"),
        ("int8", {"bits": 4, "granularity": "group"}, "int4-g32"),
        ("int4-g32", {"symmetric": False, "group_size": 64}, "int4-g64-asym"),
        ("int8", {"granularity": "tensor"}, "int8-tensor"),
        ("int8", {"form": "palette", "bits": 4}, "palette4"),
        ("int4", {"form": "palette", "group_channels": 8}, "palette4-c8"),
        ("palette6-c8", {}, "palette6-c8"),
        ("palette6-c8", {"bits": 4}, "palette4-c8"),
        ("palette4", {"form": "int"}, "int4"),
        ("float16", {}, "float16"),
        ("float16", {"form": "int"}, "int8"),
        ("int8", {"form": "float16"}, "float16"),
        ("auto", {}, "int8"),
        ("int8", {"encoding": "mxfp4"}, "mxfp4"),
        ("int8", {"encoding": "int4-g64-asym"}, "int4-g64-asym"),
        ("palette4", {"encoding": "float16"}, "float16"),
        ("mxfp4", {}, "mxfp4"),
        ("sparse-int8", {}, "sparse-int8"),
    ],
)
def test_the_encoding_that_quantize_will_make(weights, given, wanted):
    assert planned_encoding(request(weights, **{"compress/quantize": given})) == wanted


def test_an_encoding_that_is_none_is_refused():
    with pytest.raises(EncodingError, match="int6"):
        planned_encoding(request("palette6", **{"compress/quantize": {"form": "int"}}))


def test_what_an_older_system_lacks_is_refused_while_planning():
    for encoding in (Affine(4), Affine(8, True, "group", 32), Palette(4, 8)):
        refuse_unholdable(request(runtime="coreml"), lambda use, encoding=encoding: encoding)
        with pytest.raises(EncodingError, match="iOS17 is built for, and it has"):
            refuse_unholdable(request(runtime="coreml", **OLDER), lambda use, encoding=encoding: encoding)
    for encoding in (Affine(8), Palette(4), Float(16)):
        refuse_unholdable(request(runtime="coreml", **OLDER), lambda use, encoding=encoding: encoding)
    refuse_unholdable(request(runtime="onnx", **OLDER), lambda use: Affine(4))


def test_auto_chooses_among_what_the_older_system_has():
    assert dict(held_candidates(request("auto", "coreml")))["linear"] == ("int8", "int4-g32")
    assert dict(held_candidates(request("auto", "coreml", **OLDER)))["linear"] == ("int8",)


@pytest.mark.parametrize(
    ("runtime", "said", "wanted"),
    [
        ("tflite", {"weights": "int4-g32"}, ("int4-g32", "dynamic")),
        ("tflite", {"weights": "int4"}, ("int4", "float")),
        ("onnx", {"weights": "int4-g32"}, ("int4-g32", "float")),
        ("onnx", {"activations": "dynamic"}, ("int8", "dynamic")),
        ("tflite", {"weights": "int4-g32", "activations": "float"}, ("int4-g32", "float")),
        ("qnn", {"weights": "int4"}, ("int4", "int16")),
        ("tflite", {}, ("int8", "float")),
    ],
)
def test_weights_that_were_asked_for_bring_activations_that_hold_them(runtime, said, wanted):
    """One that nothing holds is refused later, with the reason of the profile's own activations."""
    asked = dataclasses.replace(request(runtime=runtime), **said)
    assert (asked.choice.weights, asked.choice.activations) == wanted
    if "activations" not in said:
        assert not refusal(asked, "linear", encoding_named(wanted[0]))
    whole = dataclasses.replace(request("auto"), weights="int4")
    assert (whole.choice.weights, whole.choice.candidates) == ("int4", ())


LAYERS = Inventory(
    (
        WeightUse("stem.weight", "conv", (8, 3, 3, 3)), WeightUse("stem.bias", "other", (8,)),
        WeightUse("head.0.weight", "linear", (4, 8)), WeightUse("head.1.weight", "linear", (4, 4)),
    ),
    (), 1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("keep", "found"),
    [
        (["stem.weight"], {"stem.weight": "float16"}),
        (["head.*=float32"], {"head.0.weight": "float32", "head.1.weight": "float32"}),
        (
            ["*=int8", "head.1.weight=float16"],
            {"head.0.weight": "int8", "head.1.weight": "float16", "stem.weight": "int8"},
        ),
        (["head.[0].weight"], {"head.0.weight": "float16"}),
        (
            ["head.*=mxfp4", "stem.*=palette4-c8"],
            {"head.0.weight": "mxfp4", "head.1.weight": "mxfp4", "stem.weight": "palette4-c8"},
        ),
        ([], {}),
    ],
)
def test_keep_names_weights_by_pattern(keep, found):
    assert dict(kept_weights(keep, LAYERS)) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stem.weigt", r"no weight has that name.*did you mean stem\.weight"),
        ("stem.bias", r"not a weight of a layer"),
        ("stem.weight=int5", r'"int5" is no encoding.*mxfp4'),
        ("stem.weight=", r'"" is no encoding'),
        ("", r"no weight has that name"),
    ],
)
def test_a_pattern_that_keeps_nothing_is_refused_with_a_way_out(text, says):
    with pytest.raises(UsageError) as refused:
        kept_weights([text], LAYERS)
    assert re.search(says, f"{refused.value} {refused.value.fix}")


def test_the_next_wider_has_more_bits_than_the_weight():
    held = (("linear", ("int8", "float16")), ("conv", ()))
    linear, conv = LAYERS.weights[2], LAYERS.weights[0]
    assert next_wider(held, linear, Affine(4)) == Affine(8)
    assert next_wider(held, linear, Affine(8)) == Float(16)
    assert next_wider(held, linear, Float(16)) is None
    assert next_wider(held, conv, Affine(4)) is None
