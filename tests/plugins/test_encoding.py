"""An encoding of another package goes through every command, and so does MXFP4, of which only some formats know."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

INPUT = ("--input", "image:f32[1,1,4,4]")
APPLE = (*INPUT, "--target", "iphone17pro", "--runtime", "coreai", "--set", "ship/benchmark.seconds=0.05")
ELSEWHERE = (*INPUT, "--target", "linux-x86", "--runtime", "onnx")
pytestmark = pytest.mark.xdist_group("plugins")


@pytest.fixture(scope="module")
def ran(installed, commands, tiny_source, tmp_path_factory) -> SimpleNamespace:
    """Every command on the tiny model: a convolution of 4 channels and a linear layer of 3, which pairs do not divide."""
    pytest.importorskip("coreai_torch")
    folder = tmp_path_factory.mktemp("ran")
    bundle, scaled = folder / "b", folder / "mxfp4"
    orders = {
        "plan": ["plan", tiny_source, *APPLE, "--weights", "nf4-c2"],
        "build": ["build", tiny_source, *APPLE, "--weights", "nf4-c2", "-o", bundle],
        "verify": ["verify", bundle],
        "inspect": ["inspect", bundle, "--json"],
        "refused": ["build", tiny_source, *ELSEWHERE, "--set", "compress/quantize.encoding=nf4-c2"],
        "unknown": ["build", tiny_source, *ELSEWHERE, "--weights", "nf5"],
        "mxfp4": ["build", tiny_source, *APPLE, "--keep", "4.weight=mxfp4", "-o", scaled],
        "inspect mxfp4": ["inspect", scaled, "--json"],
        "refused mxfp4": ["build", tiny_source, *ELSEWHERE, "--weights", "mxfp4"],
        "doctor": ["doctor", "--json"],
    }
    said = commands(installed("nf4"), folder, *orders.values())
    return SimpleNamespace(folder=folder, bundle=bundle, said=dict(zip(orders, said, strict=True)))


def encodings(said) -> dict[str, tuple[str, int]]:
    """Weight -> its encoding and bytes, as ``inspect`` lists them."""
    assert said.code == 0, said.err
    (artifact,) = json.loads(said.out)["artifacts"]
    return {name: (item["encoding"], item["bytes"]) for name, item in artifact["layers"].items()}


def test_it_is_planned_built_and_verified_bit_for_bit(ran):
    assert ran.said["plan"].code == 0, ran.said["plan"].err
    assert "nf4-c2" in ran.said["plan"].out
    assert ran.said["build"].code == 0, ran.said["build"].err
    (row,) = json.loads((ran.bundle / "report.json").read_text())["rows"]
    (verdict,) = [item for item in row["verdicts"] if item["check"] == "check/verify"]
    assert verdict["passed"]
    assert "2 weights" in verdict["summary"]
    assert ran.said["verify"].code == 0, ran.said["verify"].err


def test_inspect_names_it_and_what_it_takes(ran):
    found = encodings(ran.said["inspect"])
    # 36 numbers of 4 bits, and two tables of 16 float16 numbers.
    assert found["0.weight"] == ("nf4 per 2 channels", 18 + 2 * 32)
    assert found["4.weight"][0] == "int8 per channel"


def test_formats_without_palettes_refuse_it_for_their_own_reason(ran):
    assert ran.said["refused"].code == 5, ran.said["refused"].err
    assert "ONNX Runtime cannot hold nf4 per 2 channels" in ran.said["refused"].err
    assert "it is stored as palette4 per 2 channels, and ONNX has no form of it" in ran.said["refused"].err


def test_a_name_of_none_is_refused_with_examples_of_all(ran):
    assert ran.said["unknown"].code == 2
    assert '"nf5" is no encoding' in ran.said["unknown"].err
    assert "nf4-c8" in ran.said["unknown"].err
    assert "mxfp4" in ran.said["unknown"].err


def test_mxfp4_is_stored_where_a_runtime_holds_it(ran):
    assert ran.said["mxfp4"].code == 0, ran.said["mxfp4"].err
    # 3 x 64 numbers of 4 bits, and 6 scales of 8.
    assert encodings(ran.said["inspect mxfp4"])["4.weight"] == ("mxfp4", 96 + 6)


def test_mxfp4_is_refused_elsewhere_with_the_reason(ran):
    assert ran.said["refused mxfp4"].code == 5
    assert "has no kernel for its elements" in ran.said["refused mxfp4"].err


def test_doctor_finds_nothing_broken(ran):
    assert json.loads(ran.said["doctor"].out)["broken_plugins"] == []


@pytest.mark.parametrize("command", ["verify", "inspect", "bench"])
def test_a_bundle_opened_without_the_package_names_it_and_the_encoding(ran, cli, command):
    """This process has edgeship alone."""
    said = cli(command, ran.bundle)
    assert said.code == 8
    assert "weights are stored as nf4-c2, an encoding that nothing here knows" in said.errors[0]
    assert said.errors[0].endswith("install edgeship-nf4 1.0, which it was built with")
