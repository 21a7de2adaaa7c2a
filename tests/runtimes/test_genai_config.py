"""A bundle of others cannot make onnxruntime-genai or ONNX Runtime load a library or write a file."""

from __future__ import annotations

import json

import pytest

from edgeship.errors import ArtifactError
from edgeship.runtimes.genai_config import check_configuration

GOOD = {
    "model": {"type": "llama", "decoder": {
        "session_options": {"log_id": "x", "provider_options": []}, "filename": "model.onnx"}},
    "search": {"top_k": 1},
}  # fmt: skip


def test_what_edgeship_writes_is_taken(tmp_path):
    (tmp_path / "genai_config.json").write_text(json.dumps(GOOD))
    check_configuration(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"session_options": {"custom_ops_library": "/tmp/evil.so"}},
        {"session_options": {"provider_options": [{"qnn": {"backend_path": "evil.so"}}]}},
        {"session_options": {"enable_profiling": "/tmp/profile"}},
        {"session_options": {"config_entries": {"session.load_model_format": "ORT"}}},
        {"session_options": ["x"]},
        {"filename": "../model.onnx"},
        {"filename": "/etc/passwd"},
        {"pipeline": [{"stage": {"filename": "a/b.onnx"}}]},
        {"run_options": {"x": "y"}},
    ],
)
def test_what_it_does_not_write_is_refused(tmp_path, change):
    settings = json.loads(json.dumps(GOOD))
    settings["model"]["decoder"].update(change)
    (tmp_path / "genai_config.json").write_text(json.dumps(settings))
    with pytest.raises(ArtifactError):
        check_configuration(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]" * 2])
def test_what_is_no_json(tmp_path, text):
    (tmp_path / "genai_config.json").write_text(text)
    with pytest.raises(ArtifactError):
        check_configuration(tmp_path)


def test_session_options_of_a_manifest(tiny_bundle):
    import dataclasses

    from edgeship.core.registry import runtimes
    from edgeship.shipping.bundle import opened, read_bundle

    bundle = read_bundle(tiny_bundle)
    artifact = opened(bundle, bundle.manifest.artifacts[0])
    for key in ("session.optimized_model_external_initializers_file_name", "session.x"):
        facts = {**artifact.facts, key: "../x"}
        with pytest.raises(ArtifactError, match="which edgeship does not write"):
            runtimes()["onnx"].open(dataclasses.replace(artifact, facts=facts))
