"""Sentences under the table: what could not be stored as asked, and what takes more than its bits."""

from pathlib import Path

from edgeship.core.choice import Choice
from edgeship.core.inventory import Inventory, OpCost, WeightUse
from edgeship.core.model import Signature, Source
from edgeship.core.profile import Profile, Request
from edgeship.core.registry import targets
from edgeship.core.report import ArtifactRow
from edgeship.core.weights import Affine
from edgeship.engine.notes import notes_of
from edgeship.program.program import ProgramRecord

USES = (WeightUse("even", "linear", (8, 64)), WeightUse("odd", "linear", (8, 172)), WeightUse("conv", "conv", (8, 3)))


def notes(runtime="onnx", weights="int3-g32", **options):
    source = Source(Path("model.py"), (), reference="model.py:f")
    inventory = Inventory(USES, (), 0)
    request = Request(
        source, targets()["iphone15pro"], runtime, Profile("mine", "of a test", Choice(weights)), inventory,
        options=options,
    )  # fmt: skip
    encodings = {"even": Affine(3, True, "group", 32), "odd": Affine(3), "conv": Affine(3)}
    record = ProgramRecord(Signature((), ()), inventory, encodings)
    row = ArtifactRow("iphone15pro", runtime, "model.onnx", 1, "", "", "measured", ())
    return notes_of([request], [row], [record])


def test_groups_that_do_not_divide_and_widths_that_a_format_lacks_are_said():
    assert notes() == (
        "onnx: groups of 32 do not divide the inputs of 1 layer: one scale a channel instead, which loses more: "
        "odd (172)",
        "onnx: 3 layers of 3 bits, stored in 4: the file has no 3-bit form",
    )


def test_nothing_is_said_where_it_is_as_asked():
    assert [note for note in notes(weights="int3") if "groups" in note] == []
    # Core ML has 3 bits in lists of numbers, but not for groups.
    (said,) = [note for note in notes(runtime="coreml", weights="int3") if "no 3-bit" in note]
    assert said.startswith("coreml: 1 layer of")


def test_the_group_is_the_one_asked_for_by_hand():
    asked = notes(weights="int8", **{"compress/quantize": {"bits": 3, "granularity": "group", "group_size": 64}})
    assert asked[0].startswith("onnx: groups of 64 do not divide the inputs of 1 layer: ")


def test_layers_that_are_unpacked_at_every_run_are_said_where_they_are_much_of_the_arithmetic():
    def told(macs, runtime="onnx", weights="int4", activations="float"):
        source = Source(Path("model.py"), (), reference="model.py:f")
        costs = (OpCost("c", "aten.conv2d", macs, 1, 1, ("conv",)), OpCost("l", "aten.linear", 100, 1, 1, ("even",)))
        inventory = Inventory(USES, costs, 0)
        profile = Profile("mine", "of a test", Choice(weights, activations))
        request = Request(source, targets()["pixel9"], runtime, profile, inventory)
        encodings = {"even": Affine(int(weights[3])), "conv": Affine(int(weights[3]))}
        record = ProgramRecord(Signature((), ()), inventory, encodings)
        row = ArtifactRow("pixel9", runtime, "model", 1, "", "", "measured", ())
        return [note for note in notes_of([request], [row], [record]) if "unpacked" in note]

    assert told(100) == [
        "onnx: 1 layer with 50% of the arithmetic is unpacked at every run, which is slower than float: --profile fast "
        "is quicker, at a larger size"
    ]
    assert told(5) == told(100, "tflite") == told(100, weights="int8") == []
