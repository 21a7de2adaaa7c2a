"""The table that ends a build fits beside text, and says what it says once."""

import pytest

from edgeship.api.table import failures
from edgeship.cli.printing import print_report
from edgeship.core.report import ArtifactRow, Measurement, Report, Verdict


def row(runtime: str, file: str, samples: int, latency: Measurement) -> ArtifactRow:
    figures = (
        Measurement("accuracy", 0.988, "fraction", "measured", runs=samples),
        Measurement("accuracy_original", 0.99, "fraction", "measured"),
    )
    ratio = Measurement("total_snr", 37.94, "dB", "measured")
    verdicts = (
        Verdict("check/accuracy", runtime, True, "", figures),
        Verdict("check/verify", runtime, True, "", (ratio,)),
    )
    return ArtifactRow("all", runtime, file, 102_800, "int8 per channel", "int16", "emulated", verdicts, (latency,))


@pytest.fixture
def printed(capsys):
    timed = Measurement("latency_p50", 0.0517, "ms", "measured")
    untimed = Measurement("latency_p50", None, "ms", "emulated", note="Core ML runs on macOS and iOS only")
    rows = (
        row("coreml", "model.mlpackage", 500, untimed),
        row("tflite", "model.tflite", 540, timed),
        row("onnx", "model.onnx", 540, timed),
    )
    print_report(Report("samples/digits_cnn", "balanced", ("iphone15pro",), "", rows, (), {}, {}, {}, ""))
    return capsys.readouterr().out


def test_the_table_of_a_build_fits_into_118_columns(printed):
    assert max(map(len, printed.splitlines())) <= 118


def test_what_is_alike_in_many_rows_stands_once(printed):
    assert "accuracy on 500 samples (coreml), 540 samples (tflite, onnx)" in printed
    assert printed.count("98.8% (99.0%)") == 3
    assert printed.count("37.9 dB") == 3
    assert "coreml is not timed here: Core ML runs on macOS and iOS only" in printed


def test_what_a_check_says_of_each_target_of_one_artifact_stands_once():
    over, under = (
        Verdict("check/size", "onnx", passed, "is 3 MB, 1 MB over --max-size 2 MB") for passed in (False, True)
    )
    lower = Verdict("check/size", "onnx", False, "needs 9 GB of memory, moon allows 1 GB")
    made = ArtifactRow("all", "onnx", "model.onnx", 1, "", "", "measured", (over, over, under, lower, over), ())
    report = Report("m.py", "balanced", ("pixel9", "moon"), "", (made,), (), {}, {}, {}, "")
    assert failures(report) == [
        "check/size fell short on onnx: is 3 MB, 1 MB over --max-size 2 MB",
        "check/size fell short on onnx: needs 9 GB of memory, moon allows 1 GB",
    ]
