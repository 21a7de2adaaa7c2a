"""One rule for one thing: a changed bundle, an option that means nothing, a command that is refused."""

import json
import shutil

import pytest

import edgeship
from edgeship.core.device import TextOrder
from edgeship.core.report import Refusal, Report
from edgeship.errors import ArtifactError, GateError, UsageError


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "copy.edgeship")


def damage(bundle, how):
    file = next((bundle / "onnx").glob("*.onnx"))
    if how == "missing":
        file.unlink()
    elif how == "shorter":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    return file.relative_to(bundle).as_posix()


@pytest.mark.parametrize("how", ["missing", "shorter", "changed"])
@pytest.mark.parametrize("command", [("verify",), ("verify", "--no-run"), ("bench",), ("inspect",)])
def test_a_bundle_that_is_not_whole_ends_every_command_alike(cli, bundle, how, command):
    name = damage(bundle, how)
    if how == "changed" and command[0] == "inspect":
        pytest.skip("inspect reads no file whole")
    ran = cli(command[0], bundle, *command[1:])
    assert ran.code == ArtifactError.exit_code, ran.err
    (line,) = ran.errors
    assert name in line
    assert line.endswith("copy it again from where it was built, or move it away and build it again")


def test_how_many_more_problems_there_are_is_said(cli, bundle):
    damage(bundle, "missing")
    (bundle / "report.json").unlink()
    assert "and 1 more problem" in cli("verify", bundle).errors[0]


@pytest.mark.parametrize("option", [("--prompt", "8"), ("--new", "4"), ("--depth", "0,4"), ("--runs", "1")])
def test_an_option_for_language_models_is_refused_for_networks(cli, tiny_bundle, option):
    ran = cli("bench", tiny_bundle, *option)
    assert ran.code == 2
    assert f"{option[0]} is for language models, and {tiny_bundle} has none" in ran.errors[0]


def test_a_text_order_is_refused_for_networks_in_python_too(tiny_bundle):
    with pytest.raises(UsageError, match="text is for language models"):
        edgeship.open_bundle(tiny_bundle).bench(text=TextOrder(8, 4, (0,), 1))


@pytest.mark.parametrize(
    "wrong",
    [("--target", "nothing"), ("--input", "image:f32[0]"), ("--calibration", "nowhere.npz"), ("--context", "64"),
     ("--runtime", "qnn"), ("--max-drop", "1%")],
)  # fmt: skip
def test_a_refused_command_leaves_no_file_and_no_log_of_another_build_is_emptied(cli, tiny_order, tmp_path, wrong):
    place = tmp_path / "place"
    place.mkdir()
    assert cli("build", *tiny_order, *wrong, "-o", place / "b").code in (2, 3)
    assert list(place.iterdir()) == []
    ran = cli("build", *tiny_order, "-o", place / "b")
    assert ran.code == 0, ran.err
    before = (place / "b.log").read_bytes()
    assert cli("build", *tiny_order, *wrong, "-o", place / "b").code in (2, 3)
    assert (place / "b.log").read_bytes() == before


def test_every_runtime_that_failed_is_named(tiny_bundle):
    from dataclasses import replace

    report = json.loads((tiny_bundle / "report.json").read_text())
    assert report["refused"] == []
    known = edgeship.open_bundle(tiny_bundle).report
    refused = (
        Refusal("phone", "coreml", "lower/x", "no such operator", "rewrite it"),
        Refusal("phone", "qnn", "", "too old"),
    )
    from edgeship.api.bundles import Bundle

    bundle = Bundle(tiny_bundle, replace(known, refused=refused))
    with pytest.raises(GateError) as told:
        bundle.require()
    text = str(told.value)
    assert "no artifact for coreml: no such operator; qnn failed too" in text
    assert "onnx published without it" in text
    one = Bundle(tiny_bundle, replace(known, refused=refused[:1]))
    with pytest.raises(GateError) as told:
        one.require()
    assert "too" not in str(told.value).split(": ")[0]
    assert isinstance(known, Report)


def test_arguments_that_nobody_takes_are_named_for_what_they_are(tiny_source):
    from torch import nn

    with pytest.raises(UsageError, match="progress is for build alone"):
        edgeship.plan(tiny_source, "image:f32[1,1,4,4]", target="linux-x86", progress=print)
    with pytest.raises(UsageError, match="there is no argument targt"):
        edgeship.plan(tiny_source, "image:f32[1,1,4,4]", targt="linux-x86")
    with pytest.raises(UsageError, match=r"ReLU is a class, not a model; give one of it: ReLU\(\.\.\.\)"):
        edgeship.plan(nn.ReLU, "image:f32[1,1,4,4]", target="linux-x86")
