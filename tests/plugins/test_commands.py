"""A runtime, a device, a pass and a target of other packages go through every command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

CLIP = ("--set", "compress/clip.deviations=3")
ORDER = ("--input", "image:f32[1,1,4,4]", "--target", "zipboard", "--set", "ship/benchmark.seconds=0.05")
pytestmark = pytest.mark.xdist_group("plugins")


@pytest.fixture(scope="module")
def ran(installed, commands, tiny_source, tmp_path_factory) -> SimpleNamespace:
    """Every command on the tiny model, and the gate on accuracy falling short of 2-bit weights."""
    folder = tmp_path_factory.mktemp("ran")
    bundle, box = folder / "b", folder / "box"
    box.mkdir()
    data = folder / "labelled.npz"
    labelled(tiny_source, data)
    short = ("--eval", data, "--max-drop", "1%", "--set", "compress/quantize.bits=2", *CLIP)
    orders = {
        "plan": ["plan", tiny_source, *ORDER, *CLIP],
        "build": ["build", tiny_source, *ORDER, "-o", bundle],
        "verify": ["verify", bundle],
        "inspect": ["inspect", bundle, "--json"],
        "bench": ["bench", bundle, "--seconds", "0.1", "--json"],
        "estimate": ["bench", bundle, "--device", "estimate:zipboard", "--json"],
        "elsewhere": ["bench", bundle, "--device", "estimate:pixel9", "--json"],
        "device": ["bench", bundle, "--device", f"locker:{box}", "--seconds", "0.1", "--json"],
        "no device": ["bench", bundle, "--device", f"locker:{box}/nowhere"],
        "again": ["build", tiny_source, *ORDER, "-o", folder / "again"],
        "repaired": ["build", tiny_source, *ORDER, *short, "-o", folder / "repaired"],
        "refused": ["build", tiny_source, *ORDER, "--profile", "small", "--set", "compress/quantize.form=palette"],
        "doctor": ["doctor", "--json"],
    }
    said = commands(installed("zipgraph", "locker", "clip"), folder, *orders.values())
    return SimpleNamespace(folder=folder, bundle=bundle, box=box, said=dict(zip(orders, said, strict=True)))


def labelled(source: str, path: Path) -> None:
    """Inputs, each with the class that the model itself gives it."""
    import importlib.util

    import torch

    spec = importlib.util.spec_from_file_location("tiny", source.rpartition(":")[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    images = torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = module.model()(images).argmax(1)
    np.savez(path, image=images.numpy()[:, None], label=labels.numpy())


def test_the_plan_goes_through_its_pass(ran):
    assert ran.said["plan"].code == 0, ran.said["plan"].err
    assert "lower/torch_to_zipgraph" in ran.said["plan"].out
    assert "ZipGraphModel" in ran.said["plan"].out


def test_a_pass_goes_where_it_says(ran):
    steps = [line.split()[1] for line in ran.said["plan"].out.splitlines() if line[:1].isdigit()]
    assert steps[:3] == ["load/torch", "compress/clip", "compress/quantize"]
    passed = json.loads((ran.folder / "repaired" / "report.json").read_text())["steps"]
    assert "compress/clip" in [step["step"].split()[1] for step in passed]


def test_the_build_verifies_it_bit_for_bit_and_times_it(ran):
    assert ran.said["build"].code == 0, ran.said["build"].err
    (row,) = json.loads((ran.bundle / "report.json").read_text())["rows"]
    assert row["runtime"] == "zipgraph"
    assert {verdict["check"] for verdict in row["verdicts"]} >= {"check/verify", "check/size", "check/layers"}
    assert all(verdict["passed"] for verdict in row["verdicts"])
    assert row["weights"] == "int8 per channel"
    figures = {item["name"]: item for item in row["measurements"]}
    assert figures["latency_p50"]["how"] == "measured"
    assert figures["latency_p50"]["value"] > 0


def test_the_bundle_holds_its_kind(ran):
    (record,) = json.loads((ran.bundle / "manifest.json").read_text())["artifacts"]
    assert (record["runtime"], record["model_kind"], record["main"]) == (
        "zipgraph", "ZipGraphModel", "zipgraph/model.zipgraph"
    )  # fmt: skip
    assert {"torch", "numpy"} <= json.loads((ran.bundle / "manifest.json").read_text())["versions"].keys()
    assert ran.said["verify"].code == 0, ran.said["verify"].err
    (inspected,) = json.loads(ran.said["inspect"].out)["artifacts"]
    assert inspected["encodings"][0]["encoding"] == "int8 per channel"


def test_a_second_build_reads_it_from_the_cache(ran):
    assert ran.said["again"].code == 0
    assert "from cache" in next(
        line for line in ran.said["again"].err.splitlines() if line[2:].startswith("lower/torch_to_zipgraph")
    )


def test_it_is_timed_here_estimated_and_measured_on_the_device(ran):
    for name, how in (("bench", "measured"), ("estimate", "estimated"), ("device", "reported")):
        assert ran.said[name].code == 0, ran.said[name].err
        figures = {row["name"]: row for row in json.loads(ran.said[name].out)}
        latency = figures["latency_estimate" if name == "estimate" else "latency_p50"]
        assert (latency["how"], latency["runtime"]) == (how, "zipgraph")
        assert latency["value"] > 0
    assert not any(ran.box.iterdir()), "the device keeps what was copied to it"
    (elsewhere,) = json.loads(ran.said["elsewhere"].out)
    assert elsewhere["value"] is None
    assert "zipgraph does not run on Google Pixel 9" in elsewhere["note"]
    assert ran.said["no device"].code == 2
    assert "is not a folder; write locker:FOLDER" in ran.said["no device"].err


def test_the_gate_gives_bits_back_to_its_layers(ran):
    assert ran.said["repaired"].code == 0, ran.said["repaired"].err
    report = json.loads((ran.folder / "repaired" / "report.json").read_text())
    assert any("the accuracy gate gave" in note for note in report["notes"])
    accuracy = {item["name"]: item["value"] for verdict in report["rows"][0]["verdicts"]
                for item in verdict["measurements"]}  # fmt: skip
    assert accuracy["accuracy_drop"] <= 0.01


def test_what_it_does_not_hold_is_refused_in_its_words(ran):
    assert ran.said["refused"].code == 5, ran.said["refused"].err
    assert "Zip Graph cannot hold palette4" in ran.said["refused"].err
    assert "it stores floats and integers with scales" in ran.said["refused"].err


def test_doctor_lists_it_and_finds_nothing_broken(ran):
    found = json.loads(ran.said["doctor"].out)
    assert found["broken_plugins"] == []
    (runtime,) = [item for item in found["runtimes"] if item["name"] == "zipgraph"]
    assert runtime["ok"]
    assert "torch" in runtime["detail"]
    assert found["devices"]["locker:FOLDER"].startswith("a folder that stands for a phone")


def test_a_damaged_artifact_of_its_format_is_told_in_one_line(ran, installed, commands):
    damaged = ran.folder / "damaged"
    shutil.copytree(ran.bundle, damaged)
    file = damaged / "zipgraph" / "model.zipgraph"
    file.write_bytes(file.read_bytes()[:-40])
    (said,) = commands(installed("zipgraph", "locker", "clip"), ran.folder, ["bench", damaged])
    assert said.code not in (0, 70)
    assert len(said.err.splitlines()) == 1


def test_a_bundle_whose_runtime_is_not_installed_says_so(ran, cli):
    said = cli("verify", ran.bundle)
    assert said.code not in (0, 70)
    assert "'zipgraph', which is not here" in said.err
    assert "install its plug-in" in said.err


@pytest.mark.heavy
def test_each_command_is_a_process_of_its_own(installed, tiny_source, tmp_path):
    bundle, box = tmp_path / "b", tmp_path / "box"
    box.mkdir()
    environment = {**os.environ, **installed("zipgraph", "locker", "clip")}
    for order in (
        ["plan", tiny_source, *ORDER], ["build", tiny_source, *ORDER, "-o", bundle], ["verify", bundle],
        ["inspect", bundle], ["bench", bundle], ["bench", bundle, "--device", f"locker:{box}"], ["doctor"],
    ):  # fmt: skip
        command = [sys.executable, "-m", "edgeship.cli.main", *map(str, order)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (order, done.stderr)
