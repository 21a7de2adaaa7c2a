"""digits_cnn, the whole way: five artifacts for two phones, each run, compared, and as accurate as the original."""

import json

import pytest

from edgeship.core.artifact import MANIFEST
from edgeship.core.registry import runtimes

pytestmark = pytest.mark.xdist_group("digits")


@pytest.fixture(scope="module")
def report(digits_bundle) -> dict:
    return json.loads((digits_bundle / "report.json").read_text())


@pytest.fixture(scope="module")
def rows(report) -> dict[str, dict]:
    return {row["runtime"]: row for row in report["rows"]}


def figures(row: dict) -> dict[str, dict]:
    inside = [item for verdict in row["verdicts"] for item in verdict["measurements"]]
    return {item["name"]: item for item in [*inside, *row["measurements"]]}


def test_all_five_are_there(digits_bundle, rows):
    assert set(rows) == {"coreml", "coreai", "onnx", "tflite", "qnn"}
    manifest = json.loads((digits_bundle / MANIFEST).read_text())
    mains = {record["runtime"]: record["main"] for record in manifest["artifacts"]}
    assert mains["coreml"].endswith(".mlpackage")
    assert mains["coreai"].endswith(".aimodel")
    assert mains["onnx"].endswith(".onnx")
    assert mains["tflite"].endswith(".tflite")
    files = {file["path"].rpartition("/")[2] for record in manifest["artifacts"] for file in record["files"]}
    assert {"model.qdq.onnx", "model_ctx.onnx", "model_ctx_qnn.bin", "model.dlc"} <= files


@pytest.mark.parametrize("runtime", ["coreml", "coreai", "onnx", "tflite", "qnn"])
def test_each_passes_every_check(rows, runtime):
    row = rows[runtime]
    assert {verdict["check"] for verdict in row["verdicts"]} == {
        "check/verify",
        "check/accuracy",
        "check/layers",
        "check/size",
    }
    assert all(verdict["passed"] for verdict in row["verdicts"])
    found = figures(row)
    emulated = runtimes()[runtime].engine.execution == "emulated"
    assert found["samples"]["value"] >= (4 if emulated else 16)
    assert found["weights_read_back"]["value"] == 7
    assert row["weights"] == "int8 per channel"


@pytest.mark.parametrize("runtime", ["coreml", "coreai", "onnx", "tflite", "qnn"])
def test_each_keeps_the_accuracy_within_half_a_point(rows, runtime):
    found = figures(rows[runtime])
    assert found["accuracy"]["value"] >= 0.98
    assert found["accuracy_drop"]["value"] <= 0.005
    assert found["accuracy"]["runs"] >= 100


def test_an_estimate_is_never_told_as_a_measurement(rows):
    for runtime, row in rows.items():
        latency = figures(row)["latency_p50"]
        if not runtimes()[runtime].engine.untimed:
            assert latency["how"] == "measured"
            assert latency["value"] > 0
        else:
            assert latency["value"] is None
            assert latency["note"] == runtimes()[runtime].engine.untimed
        assert figures(row)["accuracy"]["how"] == (
            "emulated" if runtimes()[runtime].engine.execution == "emulated" else "measured"
        )


def test_the_same_integers_are_stored_in_every_artifact(digits_bundle):
    from edgeship.core.weights import same_numbers
    from edgeship.shipping.bundle import opened, read_bundle

    bundle = read_bundle(digits_bundle)
    stored = {
        record.runtime: runtimes()[record.runtime].read_weights(opened(bundle, record))
        for record in bundle.manifest.artifacts
    }
    assert {len(weights) for weights in stored.values()} == {7}
    for name, tensor in stored["onnx"].items():
        for runtime, weights in stored.items():
            assert same_numbers(tensor, weights[name]) == "", f"{name} in {runtime}"


def test_verify_bench_and_inspect_work_on_it(cli_process, digits_bundle):
    ran = cli_process("verify", digits_bundle)
    assert (ran.code, ran.err) == (0, ""), ran.err
    assert "is whole, and every artifact runs" in ran.out
    estimates = json.loads(cli_process("bench", digits_bundle, "--device", "estimate:galaxy-s24", "--json").out)
    by_artifact = {row["artifact"].split("/")[0]: row for row in estimates}
    assert by_artifact["qnn"]["how"] == "estimated"
    assert by_artifact["qnn"]["low"] < by_artifact["qnn"]["value"] < by_artifact["qnn"]["high"]
    assert by_artifact["coreml"]["value"] is None, "galaxy-s24 does not run Core ML"
    inspected = json.loads(cli_process("inspect", digits_bundle, "--json").out)
    assert len(inspected["artifacts"]) == 5


def test_a_rebuild_takes_a_tenth_of_the_first_build(cli_process, digits_bundle, report, root, tmp_path):
    phones = ("--target", "iphone15pro", "--target", "galaxy-s24")
    ran = cli_process("build", root / "samples" / "digits_cnn", *phones, "-o", "again", "--json")
    assert ran.code == 0, ran.err
    again = json.loads(ran.out)
    first = sum(step["seconds"] for step in report["steps"])
    assert sum(step["seconds"] for step in again["steps"]) < first / 10
    assert all(step["cached"] for step in again["steps"] if not step["step"].endswith("ship/package"))
    manifests = [json.loads((place / MANIFEST).read_text()) for place in (digits_bundle, tmp_path / "again")]
    assert manifests[0]["artifacts"] == manifests[1]["artifacts"]
