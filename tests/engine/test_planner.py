"""From requests to a plan: the shortest way, shared steps once, and options that fit or are refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from edgeship.core.choice import Choice
from edgeship.core.inventory import Inventory, WeightUse
from edgeship.core.model import Signature, Source
from edgeship.core.passes import Skip
from edgeship.core.profile import DataRef, Request
from edgeship.core.registry import passes, profiles, targets
from edgeship.core.settings import collect
from edgeship.engine import planner
from edgeship.engine.planner import plan_build, plan_load
from edgeship.errors import EncodingError, UsageError

SOURCE = Source(Path("m.py"), Signature((), ()), "0", form="torch", reference="m.py:f")
INVENTORY = Inventory((WeightUse("w", "linear", (4, 8)), WeightUse("b", "other", (4,))), (), 32)
LOAD = {"inputs": ("x:f32[1,8]",), "outputs": (), "factory": None, "notes": {}}


def request(runtime="onnx", target="iphone15pro", profile="balanced", options=None, **changes) -> Request:
    """A request; ``options`` may be text, which is typed here as an order types it."""
    made = Request(SOURCE, targets()[target], runtime, profiles()[profile], INVENTORY, load=LOAD)
    return replace(made, options=collect((), options or {}), **changes)


def names(plan) -> list[str]:
    return [step.name for step in plan.steps]


def test_a_route_goes_from_the_source_to_its_artifact_and_its_checks():
    plan = plan_build([request("coreml")])
    assert names(plan) == [
        "load/torch", "compress/quantize", "lower/torch_to_coreml", "check/layers", "check/size", "check/verify",
        "ship/benchmark", "ship/package",
    ]  # fmt: skip
    assert [step.index for step in plan.steps] == list(range(8))
    by_name = {step.name: step for step in plan.steps}
    assert by_name["check/verify"].inputs == {"model": 2, "reference": 1, "original": 0}
    assert by_name["check/size"].inputs == {"model": 2, "reference": 1}
    assert plan.steps[0].inputs == {"model": -1}


def test_qnn_goes_through_onnx_after_calibration():
    data = DataRef("c.npz", "1")
    plan = plan_build([request("qnn", "galaxy-s24", calibration=data)])
    route = [name for name in names(plan) if name.split("/")[0] in ("load", "compress", "lower")]
    assert route == [
        "load/torch",
        "compress/quantize",
        "compress/calibrate",
        "lower/torch_to_onnx",
        "lower/onnx_to_qnn",
    ]
    assert plan.steps[2].task.data == data
    verify = next(step for step in plan.steps if step.name == "check/verify")
    assert verify.inputs == {"model": 4, "reference": 2, "original": 0}


def test_every_skipped_pass_has_its_reason():
    plan = plan_build([request("coreml")])
    assert set(passes()) == set(names(plan)) | set(plan.skipped)
    assert plan.skipped["check/accuracy"] == "no --eval data"
    assert plan.skipped["lower/torch_to_tflite"] == "only for runtime tflite"
    assert all(f"skipped: {reason}" in plan.text() for reason in plan.skipped.values())


def test_reasons_that_differ_are_told_by_runtime():
    small = [request(runtime, profile="small") for runtime in ("coreml", "tflite", "onnx")]
    calibrated = replace(small[2], profile=replace(small[2].profile, runtimes={"onnx": Choice("int8", "float")}))
    plan = plan_build([small[0], small[1], calibrated])
    assert plan.skipped["compress/calibrate"] == (
        "coreml, onnx: profile small keeps activations float; tflite: profile small keeps activations dynamic"
    )
    assert plan.skipped["check/accuracy"] == "no --eval data", "one reason is told once"
    assert plan.skipped["lower/onnx_to_qnn"] == "only for runtime qnn"


def test_reasons_that_differ_by_target_say_so():
    builder = planner._Builder()
    for target, runtime, reason in (
        ("iphone15pro", "onnx", "no wheels"),
        ("galaxy-s24", "onnx", "no wings"),
        ("iphone15pro", "coreml", "never"),
    ):
        builder.skip("check/plugged", Skip(reason), request(runtime, target))
    assert builder.plan().skipped["check/plugged"] == (
        "onnx on iphone15pro: no wheels; onnx on galaxy-s24: no wings; coreml: never"
    )


def test_steps_that_two_targets_share_run_once():
    plan = plan_build([request("onnx", "iphone15pro"), request("onnx", "galaxy-s24")])
    assert names(plan).count("lower/torch_to_onnx") == 1
    assert names(plan).count("compress/quantize") == 1
    assert names(plan).count("check/size") == 2, "the limits differ"
    assert names(plan).count("ship/package") == 1
    lower = next(step for step in plan.steps if step.name == "lower/torch_to_onnx")
    assert lower.routes == (("iphone15pro", "onnx"), ("galaxy-s24", "onnx"))


def test_steps_that_differ_are_not_shared():
    plan = plan_build([request("onnx", "galaxy-s24"), request("qnn", "galaxy-s24")])
    assert names(plan).count("lower/torch_to_onnx") == 2
    # Hexagon holds other wide encodings for weights that are raised.
    assert names(plan).count("compress/quantize") == 2
    shared = plan_build([request("onnx", "galaxy-s24"), request("tflite", "galaxy-s24")])
    assert names(shared).count("compress/quantize") == 1


def test_the_same_route_twice_is_one():
    assert plan_build([request(), request()]) == plan_build([request()])


def test_loading_is_planned_alone():
    plan = plan_load(request(inventory=None))
    assert names(plan) == ["load/torch"]


def test_options_are_parsed_by_the_fields_type():
    given = {
        "compress/quantize": {"bits": "4", "granularity": "group", "group_size": "8", "symmetric": "true"},
        "check/verify": {"min_snr_db": "12.5", "samples": "30"},
        "ship/benchmark": {"seconds": "2"},
    }
    plan = plan_build([request(options=given)])
    by_name = {step.name: step.task for step in plan.steps}
    quantize, verify = by_name["compress/quantize"], by_name["check/verify"]
    assert (quantize.bits, quantize.granularity, quantize.group_size, quantize.symmetric) == (4, "group", 8, True)
    assert (verify.min_snr_db, verify.samples) == (12.5, 30)
    assert by_name["ship/benchmark"].seconds == 2.0
    assert "bits=4 granularity=group group_size=8" in plan.text()


def test_none_clears_an_option_that_may_be_empty():
    plan = plan_build([request(options={"check/size": {"max_size_bytes": "none"}}, max_size_bytes=5)])
    assert next(step.task for step in plan.steps if step.name == "check/size").max_size_bytes is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"compress/quantise": {"bits": "8"}}, 'no pass "compress/quantise"; did you mean compress/quantize?'),
        ({"compress/quantize": {"bit": "8"}}, "compress/quantize has no option bit; did you mean bits?"),
        ({"compress/quantize": {"bits": "eight"}}, "compress/quantize.bits: expected int, found 'eight'"),
        ({"compress/quantize": {"bits": "8.5"}}, "compress/quantize.bits: expected int, found '8.5'"),
        ({"compress/quantize": {"bits": ""}}, "compress/quantize.bits: expected int, found ''"),
        ({"compress/quantize": {"symmetric": "maybe"}}, "compress/quantize.symmetric: expected bool"),
        ({"compress/quantize": {"granularity": "row"}}, "'row' is not one of tensor, channel, group"),
        ({"check/verify": {"min_snr_db": "high"}}, "check/verify.min_snr_db: expected float"),
        ({"compress/calibrate": {"bits": "8"}}, "--set compress/calibrate has no effect: profile balanced keeps"),
        ({"lower/torch_to_coreml": {"compute": "float32"}}, "has no effect: only for runtime coreml"),
        (
            {"check/verify": {"data": "d.npz"}},
            "check/verify.data is set by the command line; change --calibration or --eval",
        ),
        (
            {"check/size": {"profiles": "x"}},
            "check/size.profiles is set by the command line; change the profiles there",
        ),
        ({"check/size": {"limit": "5"}}, "check/size has no option limit; did you mean limit_bytes?"),
        (
            {"load/torch": {"inputs": "x:f32[1]"}},
            "load/torch.inputs is set by the command line; change --input instead",
        ),
    ],
)
def test_an_option_that_does_not_fit_is_refused(options, says):
    with pytest.raises(UsageError) as raised:
        plan_build([request(options=options)])
    assert says in str(raised.value)


@pytest.mark.parametrize("options", [{"bits": "4", "granularity": "group", "group_size": "8"}, {"bits": "2"}])
def test_what_a_runtime_cannot_hold_is_refused_before_anything_runs(options):
    with pytest.raises(EncodingError, match=r"cannot hold int\d .* for linear \(w\)"):
        plan_build([request("qnn", "galaxy-s24", options={"compress/quantize": options})])


def test_a_width_that_does_not_exist_is_refused_before_anything_runs():
    with pytest.raises(EncodingError, match="int7 is not an encoding; use 2, 3, 4 or 8 bits"):
        plan_build([request(options={"compress/quantize": {"bits": "7"}})])


def test_a_target_without_the_hardware_says_why():
    with pytest.raises(UsageError, match=r"no way from m\.py:f to QnnModel for qnn on iphone15pro") as raised:
        plan_build([request("qnn", "iphone15pro")])
    assert "has no Hexagon" in str(raised.value)


def test_a_plan_as_data_names_every_step():
    plain = plan_build([request()]).plain()
    assert [step["pass"] for step in plain["steps"]] == names(plan_build([request()]))
    assert plain["steps"][1]["options"]["bits"] == 8
    assert plain["steps"][1]["routes"] == [["iphone15pro", "onnx"]]


def test_a_route_that_cannot_be_planned_is_listed_beside_the_others():
    palette = {"compress/quantize": {"form": "palette", "bits": 4}}
    both = [request("qnn", "galaxy-s24", options=palette), request("coreml", options=palette)]
    plan = plan_build(both)
    assert {runtime for step in plan.steps for _, runtime in step.routes} == {"coreml"}
    (refusal,) = plan.refused
    assert (refusal.runtime, refusal.target, refusal.exit_code) == ("qnn", "galaxy-s24", EncodingError.exit_code)
    assert "cannot hold" in refusal.reason
    assert f"x  qnn on galaxy-s24: {refusal.reason}" in plan.text()
    assert plan.plain()["refused"][0]["runtime"] == "qnn"
    # What is left is the plan that the other route has alone.
    assert plan.steps == plan_build(both[1:]).steps
    with pytest.raises(EncodingError):
        plan_build(both, all_or_nothing=True)
    with pytest.raises(EncodingError):
        plan_build(both[:1])


def test_a_wrong_option_is_no_matter_of_one_route():
    wrong = {"compress/quantize": {"bitz": 4}}
    with pytest.raises(UsageError, match="no option bitz"):
        plan_build([request(options=wrong), request("coreml", options=wrong)])
