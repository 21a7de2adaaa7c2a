"""What passes ask while they are planned: the encoding that will be, and whether the target holds it."""

from pathlib import Path

import pytest

from edgeship.core.inventory import Inventory, WeightUse
from edgeship.core.model import Source
from edgeship.core.planning import held_candidates, planned_encoding, refuse_unholdable
from edgeship.core.profile import Choice, Profile, Request
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
        ("int8", {"bits": "4", "granularity": "group"}, "int4-g32"),
        ("int4-g32", {"symmetric": "false", "group_size": "64"}, "int4-g64-asym"),
        ("int8", {"granularity": "tensor"}, "int8-tensor"),
        ("int8", {"form": "palette", "bits": "4"}, "palette4"),
        ("int4", {"form": "palette", "group_channels": "8"}, "palette4-c8"),
        ("palette6-c8", {}, "palette6-c8"),
        ("palette6-c8", {"bits": "4"}, "palette4-c8"),
        ("palette4", {"form": "int"}, "int4"),
        ("float16", {}, "float16"),
        ("float16", {"form": "int"}, "int8"),
        ("int8", {"form": "float16"}, "float16"),
        ("auto", {}, "int8"),
    ],
)
def test_the_encoding_that_quantize_will_make(weights, given, wanted):
    assert planned_encoding(request(weights, **{"compress/quantize": given})) == wanted


def test_an_encoding_that_is_none_is_refused():
    with pytest.raises(UsageError, match="int6"):
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
