"""What one runtime cannot take is a line of the report; the others are published all the same."""

import functools
from dataclasses import replace

import pytest

import edgeship
from edgeship.core.registry import runtimes
from edgeship.errors import FaultError, GateError, LoweringError, MissingToolError
from edgeship.passes.check.verify import VerifyArtifact
from edgeship.passes.lower.torch_to_tflite import TorchToTFLite

BOTH = {"target": "linux-x86", "runtimes": ["onnx", "tflite"], "weights": "int8"}


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A module and an example, and a folder of its own to build in."""
    import torch
    from torch import nn

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), torch.zeros(1, 6)


def refuse(monkeypatch, error):
    """LiteRT's lowering ends in an error."""

    # The annotations of run are the pass's place in the graph.
    @functools.wraps(TorchToTFLite.run)
    def run(self, model, ctx):
        raise error

    monkeypatch.setattr(TorchToTFLite, "run", run)


@pytest.mark.parametrize(
    ("error", "raised", "code"),
    [(LoweringError("no such operator", fix="rewrite it"), GateError, 1), (ZeroDivisionError("ours"), FaultError, 70)],
)
def test_a_lowering_that_fails_leaves_the_other_runtime_its_bundle(network, monkeypatch, error, raised, code):
    refuse(monkeypatch, error)
    bundle = edgeship.build(*network, **BOTH, output="out")
    assert not bundle.passed
    assert bundle.published
    assert [artifact.runtime for artifact in bundle] == ["onnx"]
    assert bundle.verify() == []
    (refusal,) = bundle.report.refused
    assert (refusal.runtime, refusal.step) == ("tflite", "lower/torch_to_tflite")
    assert error.args[0] in refusal.reason
    with pytest.raises(raised, match=r"no artifact for tflite.*onnx published without it") as told:
        bundle.require()
    assert told.value.exit_code == code
    # Who gets the folder and not this report reads the same.
    assert edgeship.open_bundle(bundle.path).report.refused == bundle.report.refused


def test_all_or_nothing_ends_at_the_first_refusal(network, monkeypatch, tmp_path):
    refuse(monkeypatch, LoweringError("no such operator"))
    with pytest.raises(LoweringError, match="no such operator"):
        edgeship.build(*network, **BOTH, output="out", all_or_nothing=True)
    assert list(tmp_path.iterdir()) == []


def test_the_only_runtime_s_refusal_is_the_error_itself(network, monkeypatch, tmp_path):
    refuse(monkeypatch, LoweringError("no such operator"))
    with pytest.raises(LoweringError, match="no such operator"):
        edgeship.build(*network, target="linux-x86", runtime="tflite", weights="int8", output="out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def wrong_on_tflite(monkeypatch):
    """check/verify finds that LiteRT's artifact falls short."""
    run = VerifyArtifact.run

    @functools.wraps(run)
    def falls_short(self, *given, **named):
        verdict = run(self, *given, **named)
        return replace(verdict, passed=False, summary="3 dB") if verdict.runtime == "tflite" else verdict

    monkeypatch.setattr(VerifyArtifact, "run", falls_short)


def test_an_artifact_that_falls_short_does_not_ship_and_the_other_does(network, wrong_on_tflite):
    bundle = edgeship.build(*network, **BOTH, output="out")
    assert not bundle.passed
    assert [artifact.runtime for artifact in bundle] == ["onnx"]
    assert [row.runtime for row in bundle.report.rows] == ["onnx", "tflite"]
    assert any("check/verify fell short on tflite: 3 dB" in reason for reason in bundle.reasons)


def test_all_or_nothing_publishes_nothing_when_one_falls_short(network, wrong_on_tflite, tmp_path):
    bundle = edgeship.build(*network, **BOTH, output="out", all_or_nothing=True)
    assert not bundle.published
    assert list(tmp_path.iterdir()) == []


def test_a_limit_of_the_user_s_holds_everything_back(network, tmp_path):
    """Sizes differ: what one artifact exceeds and the other keeps publishes neither."""
    sizes = {row.runtime: row.size_bytes for row in edgeship.build(*network, **BOTH, output="all").report.rows}
    between = (min(sizes.values()) + max(sizes.values())) // 2
    bundle = edgeship.build(*network, **BOTH, output="out", max_size=between)
    assert [row.passed for row in bundle.report.rows].count(False) == 1
    assert not bundle.published
    assert not (tmp_path / "out").exists()


def test_a_runtime_whose_package_is_not_installed_is_one_row_too(network, monkeypatch):
    def versions(self):
        raise MissingToolError("LiteRT needs ai-edge-litert", fix='pip install "edgeship[tflite]"')

    monkeypatch.setattr(type(runtimes()["tflite"]), "versions", versions)
    bundle = edgeship.build(*network, **BOTH, output="out")
    assert [artifact.runtime for artifact in bundle] == ["onnx"]
    (refusal,) = bundle.report.refused
    assert (refusal.runtime, refusal.step, refusal.exit_code) == ("tflite", "", MissingToolError.exit_code)
    assert "edgeship[tflite]" in refusal.fix
    for alone in ({"runtimes": ["tflite"]}, {"all_or_nothing": True}):
        with pytest.raises(MissingToolError):
            edgeship.build(*network, **{**BOTH, **alone}, output="other")
